"""Light: soft shadows, ambient occlusion, the floor, matte rubber and mirror-like metal.

A soft shadow is the smallest signed distance between the way to the light and a solid, over the light's width there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.scenes.pack import OBJ, SHOT, Shots
from sfumato.scenes.rays import Rays, by_shape, closest, runs_of, sphere_pairs, take, take_all, to_local, turn
from sfumato.scenes.solids import SDF, Vec, along, dot, unit

SECTIONS = 7  # of the golden-section search for a shadow ray's nearest approach
AO_LIFT, AO_REACH = 0.30, 0.56  # in the object's radii
GOLDEN = 0.6180339887498949


def shadows(
    rays: Rays,
    point: Vec,
    pairs: tuple[Tensor, Tensor] | None = None,
    own: Tensor | None = None,
    facing: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Share of the key light that reaches each point, and of the light from all sides that nearby objects let through.

    pairs: the (ray, object) pairs to look at; by default all of listed rays. Points on objects name their `own` object,
    which casts nothing on itself, and say whether they face the light at all.
    """
    shots = rays.shots
    table, slots = shots.objects, max(shots.slots, 1)
    total, shape = point[0].numel(), point[0].shape
    flat = tuple(v.reshape(-1) for v in point)
    light, soft = rays.vec("lx", "ly", "lz"), rays["soft"]
    if pairs is None:
        blocked: list[tuple[Tensor, Tensor]] = []
        crowded: list[tuple[Tensor, Tensor]] = []
        for k in range(shots.slots):
            obj = rays.owner * slots + k
            blocks, near = _reach(table, obj, flat, light, soft)
            if own is not None and facing is not None:
                other = obj != own
                blocks, near = blocks & other & facing, near & other
            for found, mask in ((blocked, blocks), (crowded, near)):
                ray = mask.nonzero()[:, 0]
                found.append((ray, take(obj, ray)))
        blockers, neighbours = (by_shape(shots, found, flat[0].device) for found in (blocked, crowded))
    else:
        ray, obj = pairs
        owner = obj // slots
        light = tuple(take(shots.shots[SHOT[name]], owner) for name in ("lx", "ly", "lz"))
        start = take_all(flat, ray)
        masks = _reach(table, obj, start, light, take(shots.shots[SHOT["soft"]], owner))
        kept = [mask.nonzero()[:, 0] for mask in masks]
        blockers, neighbours = ((take(ray, k), take(obj, k)) for k in kept)
    lit = _spread(*_penumbra(shots, flat, *blockers), slots, total)
    ao = _spread(*_crowding(shots, flat, *neighbours), slots, total)
    return lit.reshape(shape), ao.reshape(shape)


def _reach(table: Tensor, obj: Tensor, point: Vec, light: Vec, soft: Tensor) -> tuple[Tensor, Tensor]:
    """Whether an object can stand between a point and the light; whether it is near enough to darken it."""
    c = tuple(take(table[OBJ[name]], obj) - point[i] for i, name in enumerate(("cx", "cy", "cz")))
    bound = take(table[OBJ["bound"]], obj)
    middle, square = dot(c, light), dot(c, c)
    wide = bound + (soft * (middle + bound).clamp(min=0) + 0.025)
    there = bound > 0
    reach = bound + take(table[OBJ["scale"]], obj) * (AO_LIFT + AO_REACH)
    blocks = (square - middle * middle < wide * wide) & (middle > -bound) & there
    return blocks, (square < reach * reach) & there


def _distance(runs: list[slice], p: Vec) -> Tensor:
    return torch.cat(
        [sdf(tuple(v[run] for v in p)) for run, sdf in zip(runs, SDF, strict=True) if run.stop > run.start]
    )


def _penumbra(shots: Shots, flat: Vec, ray: Tensor, obj: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ray, object and the share of the light that the object lets pass."""
    if not len(ray):
        return ray, obj, torch.ones(0, device=ray.device)
    table, owner = shots.objects, obj // shots.slots
    to = tuple(take(shots.shots[SHOT[name]], owner) for name in ("lx", "ly", "lz"))
    scale, soft = take(table[OBJ["scale"]], obj), take(shots.shots[SHOT["soft"]], owner)
    p, d = to_local(table, obj, take_all(flat, ray)), turn(table, obj, to)
    d = tuple(v * scale for v in d)  # of length 1: lengths below are in units of the object's radius
    bound = take(table[OBJ["bound"]], obj) * take(table[OBJ["inverse"]], obj)
    runs = runs_of(shots, obj)
    middle = -dot(p, d)
    low, high = (middle - bound).clamp(min=0), (middle + bound).clamp(min=0)
    width = (high - low) * GOLDEN
    a, b = high - width, low + width
    da, db = _distance(runs, along(p, a, d)), _distance(runs, along(p, b, d))
    for _ in range(SECTIONS):  # golden section: along a line, the distance to a convex solid is convex
        left = da < db
        low, high = torch.where(left, low, a), torch.where(left, b, high)
        width = width * GOLDEN
        fresh = torch.where(left, high - width, low + width)
        d_fresh = _distance(runs, along(p, fresh, d))
        a, b = torch.where(left, fresh, b), torch.where(left, a, fresh)
        da, db = torch.where(left, d_fresh, db), torch.where(left, da, d_fresh)
    least, where = torch.minimum(da, db), torch.where(da < db, a, b)
    s = (least / (soft * where + 0.025) * 0.5 + 0.5).clamp(0, 1)
    return ray, obj, s * s * (3.0 - s - s)


def _crowding(shots: Shots, flat: Vec, ray: Tensor, obj: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ray, object and the share of light from all sides that the object leaves, by its nearness."""
    if not len(ray):
        return ray, obj, torch.ones(0, device=ray.device)
    p = to_local(shots.objects, obj, take_all(flat, ray))
    near = (
        1.0 - (_distance(runs_of(shots, obj), (p[0], p[1], p[2] + AO_LIFT)) + 0.06) * (1 / (AO_REACH + 0.06))
    ).clamp(0, 1)
    return ray, obj, 1.0 - near * near * 0.62


def _spread(ray: Tensor, obj: Tensor, share: Tensor, slots: int, total: int) -> Tensor:
    """Product over the objects of a ray, always in the order of their slots so that it rounds the same way."""
    out = torch.ones(total, device=share.device)
    slot = obj - obj // slots * slots
    for k in range(slots):
        mine = (slot == k).nonzero()[:, 0]
        rays = take(ray, mine)  # a ray meets each slot once
        out[rays] = take(out, rays) * take(share, mine)
    return out


def floor_color(rays: Rays, point: Vec, lit: Tensor, ao: Tensor) -> list[Tensor]:
    """Linear radiance of the floor: a pool of light that fades into the backdrop."""
    x, y = point[0] - rays["tx"], point[1] - rays["ty"]
    away = x * rays["hx"] + y * rays["hy"]
    fade = ((away - 2.0) * (1 / 8.0)).clamp(0, 1)
    fade = fade * fade * (3.0 - fade - fade)
    spread = (x * x + y * y) * (1 / 60.0)
    pool = 1.0 / (1.0 + spread)
    key = lit * pool * (rays["lz"] * 0.86)
    around = ao * (pool * 0.17 + 0.17)
    shade = ((lit * ao) * 0.45 + 0.55) * 0.72
    out = []
    for name in "rgb":
        near = (key * rays["k" + name] + around * rays["amb_" + name]) * rays["floor_" + name]
        out.append(near + fade * (shade * rays["back_" + name] - near))
    return out


def _sky(rays: Rays, d: Vec) -> list[Tensor]:
    """What a mirror sees above the floor: backdrop, darker zenith, the key light as a soft box and a strip behind."""
    light = rays.vec("lx", "ly", "lz")
    rise = d[2].clamp(0, 1)
    facing = dot(d, light)
    box = ((facing - 0.90) * (1 / 0.05)).clamp(0, 1)
    box = box * box * (3.0 - box - box)
    strip = ((d[0] * rays["hx"] + d[1] * rays["hy"] - 0.2) * 1.4).clamp(0, 1) * (
        1.0 - (rise - 0.45).abs() * 5.0
    ).clamp(0, 1)
    level = 0.55 + 0.75 * (rise * 1.6).clamp(max=1) - 0.95 * (rise - 0.35).clamp(min=0)
    return [rays["back_" + n] * level + (2.6 * box + 0.5 * strip) * rays["k" + n] for n in "rgb"]


def _albedo(shots: Shots, obj: Tensor) -> list[Tensor]:
    return [take(shots.objects[OBJ[name]], obj) for name in "rgb"]


def _diffuse(rays: Rays, point: Vec, normal: Vec, lit: Tensor) -> list[Tensor]:
    """Irradiance over pi at points of objects: key light, sky from above, the floor's light from below."""
    facing = (dot(normal, rays.vec("lx", "ly", "lz")) * 1.08 - 0.02).clamp(0, 1)
    up = 0.5 + 0.5 * normal[2]
    ground = (point[2] * 0.9).clamp(0, 1)
    low = 0.45 + 0.55 * ground * (2.0 - ground)
    out = []
    for n in "rgb":
        bounce = rays["floor_" + n] * (1.0 - up) * 0.42 * (0.35 + 0.65 * ground)
        out.append(
            facing * lit * rays["k" + n] * 0.92
            + rays["amb_" + n] * (0.12 + 0.26 * up) * (low + (1.0 - low) * up)
            + bounce
        )
    return out


def object_color(rays: Rays, point: Vec, d: Vec, normal: Vec, obj: Tensor) -> list[Tensor]:
    """Linear radiance of objects: matte rubber with a dull sheen, or tinted metal with one mirror bounce."""
    shots = rays.shots
    light = rays.vec("lx", "ly", "lz")
    lifted = along(point, torch.full_like(point[0], 1e-3), normal)
    lit, ao = shadows(rays, lifted, own=obj, facing=dot(normal, light) > 0)
    albedo = _albedo(shots, obj)
    light_in = _diffuse(rays, point, normal, lit)
    half = unit(tuple(light[i] - d[i] for i in range(3)))
    gloss = dot(normal, half).clamp(min=0)
    for _ in range(4):
        gloss = gloss * gloss
    grazing = (1.0 + dot(normal, d)).clamp(0, 1)
    fresnel = grazing * grazing * grazing
    ao = 0.35 + 0.65 * ao
    out = []
    for c, n in enumerate("rgb"):
        sheen = 0.10 * gloss * lit * rays["k" + n] + 0.10 * fresnel * rays["back_" + n]
        out.append(albedo[c] * light_in[c] * ao + sheen)
    metal = (take(shots.objects[OBJ["metal"]], obj) > 0.5).nonzero()[:, 0]
    if not len(metal):
        return out
    mirror = Rays(shots, take(rays.owner, metal))
    n_m, d_m = take_all(normal, metal), take_all(d, metal)
    twice = dot(n_m, d_m) * -2.0
    bounce = along(d_m, twice, n_m)
    seen = _mirror(mirror, take_all(lifted, metal), bounce, obj[metal])
    f = fresnel[metal]
    gloss, lit = gloss[metal], lit[metal]
    broad = gloss
    for _ in range(3):
        gloss = gloss * gloss
    for c, n in enumerate("rgb"):
        base = albedo[c][metal]
        tint = base * 0.94 + 0.05
        mirror_color = seen[c] * (tint + (0.9 - tint).clamp(min=0) * f)
        out[c][metal] = (
            base * light_in[c][metal] * 0.20
            + mirror_color
            + (0.22 * broad + 1.5 * gloss) * lit * mirror["k" + n]
        )
    return out


def _mirror(rays: Rays, o: Vec, d: Vec, own: Tensor) -> list[Tensor]:
    """What reflected rays see: the floor with its shadows, other objects in plain light, else the studio."""
    out = _sky(rays, d)
    down = (d[2] < -1e-3).nonzero()[:, 0]
    if len(down):
        below = Rays(rays.shots, take(rays.owner, down))
        o_d, d_d = take_all(o, down), take_all(d, down)
        t = -o_d[2] / d_d[2]
        ground = along(o_d, t, d_d)
        lit, ao = shadows(below, ground)
        dim = 1.08 - 0.62 * (t * (1 / 5.0)).clamp(0, 1)  # far floor is dark: gives flat mirrors a gradient
        for c, color in enumerate(floor_color(below, ground, lit, ao)):
            out[c][down] = color * dim
    best, ray, obj, normal = closest(rays.shots, o, d, sphere_pairs(rays, o, d, own), o[0].numel())
    if len(ray):
        hit = Rays(rays.shots, take(rays.owner, ray))
        point = along(take_all(o, ray), best[ray], take_all(d, ray))
        light_in = _diffuse(hit, point, normal, torch.ones_like(point[0]))
        for c, base in enumerate(_albedo(rays.shots, obj)):
            out[c][ray] = base * light_in[c]
    return out
