"""Scenes to pictures: a batched ray tracer in plain tensor operations, the same on the CPU and the GPU.

Rays are kept as lists, and each shape is met only by rays near an object of that shape: (ray, object) pairs are listed
first from picture boxes (primary rays) or from bounding spheres (all others), then intersected shape by shape. Soft
shadows are the smallest signed distance between the way to the light and a solid, over the light's width there.
Only correctly rounded operations are used, so a picture does not depend on the batch it is rendered in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import InputError
from sfumato.scenes.graph import SHAPES, Scene
from sfumato.scenes.pack import OBJ, SHOT, Shots, pack
from sfumato.scenes.solids import HIT, INF, SDF, Vec, along, dot, unit

CHUNK_RAYS = {"cpu": 2**18, "cuda": 2**22}
SUBSAMPLES = ((-0.125, -0.375), (0.375, -0.125), (0.125, 0.375), (-0.375, 0.125))  # rotated grid, in pixels
EDGE = 0.035  # difference in brightness between neighbours from which a pixel is sampled four times
SECTIONS = 7
AO_LIFT, AO_REACH = 0.30, 0.56  # in the object's radii
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Render:
    """rgb: (B, 3, T, H, W) in [0, 1]; depth: (B, T, H, W) along the view axis; instances: (B, T, H, W) uint8, 0 for the
    floor and k for object k - 1; normals: (B, 3, T, H, W), unit, in world axes."""

    rgb: Tensor
    depth: Tensor
    instances: Tensor
    normals: Tensor


def render(scenes: Sequence[Scene], size: int = 128, device: str | torch.device = "cpu", *, antialias: bool = True) -> Render:
    """Render scenes with equally many frames at `size` × `size` pixels. Raises `InputError`."""
    if not scenes:
        raise InputError("there is no scene to render", argument="scenes")
    if not 8 <= size <= 4096:
        raise InputError(f"size {size} is outside 8 to 4096", argument="size")
    frames = scenes[0].frames
    if any(scene.frames != frames for scene in scenes):
        raise InputError("scenes of one batch must have equally many frames", argument="scenes")
    device = torch.device(device)
    shots = [(scene, seconds) for scene in scenes for seconds in scene.times()]
    per_chunk = max(1, CHUNK_RAYS.get(device.type, 2**18) // (size * size))
    parts = []
    with torch.inference_mode():
        for start in range(0, len(shots), per_chunk):
            parts.append(_render_shots(pack(shots[start : start + per_chunk], device), size, antialias))
    rgb, depth, instances, normals = (torch.cat(part) for part in zip(*parts, strict=True))
    batch = (len(scenes), frames)
    return Render(
        rgb.unflatten(0, batch).transpose(1, 2).contiguous(),
        depth.unflatten(0, batch),
        instances.unflatten(0, batch),
        normals.unflatten(0, batch).transpose(1, 2).contiguous(),
    )


def _take(values: Tensor, index: Tensor) -> Tensor:
    return values.index_select(0, index)


class _Rays:
    """Rays of many shots. Dense: tensors (S, N), shot s in row s. Listed: tensors (R,), with the shot of each."""

    def __init__(self, shots: Shots, shot: Tensor | None):
        self.shots, self.shot = shots, shot
        self._known: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """A property of each ray's shot, shaped to broadcast with the rays."""
        if name not in self._known:
            row = self.shots.shots[SHOT[name]]
            self._known[name] = row[:, None] if self.shot is None else _take(row, self.shot)
        return self._known[name]

    def vec(self, *names: str) -> Vec:
        return tuple(self[name] for name in names)


def _render_shots(shots: Shots, size: int, antialias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count, device = len(shots), shots.shots.device
    line = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (2.0 / size) - 1.0
    across = line.repeat(size)[None]
    down = line.repeat_interleave(size)[None]
    rays = _Rays(shots, None)
    color, depth, inst, normal = _primary(rays, across, down, size)
    image = torch.stack(color, 1).reshape(count, 3, size, size)
    inst = inst.reshape(count, size, size)
    if antialias:
        pixel = _edges(image, inst).reshape(-1).nonzero()[:, 0]
        shot = pixel // (size * size)
        spot = pixel - shot * (size * size)
        fine = _Rays(shots, shot.repeat(4))
        x = torch.cat([across[0][spot] + dx * (2.0 / size) for dx, _ in SUBSAMPLES])
        y = torch.cat([down[0][spot] + dy * (2.0 / size) for _, dy in SUBSAMPLES])
        samples = _primary(fine, x, y, size)[0]
        flat = image.reshape(count, 3, -1)
        for c in range(3):
            a = samples[c].reshape(4, -1)
            flat[:, c][shot, spot] = ((a[0] + a[1]) + (a[2] + a[3])) * 0.25
    shape = (count, 3, size, size)
    return _srgb(image), depth.reshape(count, size, size), inst, torch.stack(normal, 1).reshape(shape)


def _edges(image: Tensor, inst: Tensor) -> Tensor:
    """Pixels that differ from a neighbour in object or brightness: (S, H, W) bool."""
    light = (image[:, 0] * 0.3 + image[:, 1] * 0.6 + image[:, 2] * 0.1).sqrt()
    mask = torch.zeros_like(inst, dtype=torch.bool)
    for a, b in (
        ((slice(None), slice(1, None)), (slice(None), slice(None, -1))),
        ((slice(None), slice(None), slice(1, None)), (slice(None), slice(None), slice(None, -1))),
    ):
        differs = (inst[a] != inst[b]) | ((light[a] - light[b]).abs() > EDGE)
        mask[a] |= differs
        mask[b] |= differs
    return mask


def _srgb(linear: Tensor) -> Tensor:
    """Linear light to sRGB by three nested square roots, within 0.003 of the standard's curve."""
    a = linear.clamp(0, 1).sqrt()
    b = a.sqrt()
    return (a * 0.585122381 + b * 0.783140355 - b.sqrt() * 0.368262736).clamp(0, 1)


def _tone(v: Tensor) -> Tensor:
    """A straight line up to 0.7, then a shoulder that never reaches 1."""
    over = (v - 0.7).clamp(min=0)
    return torch.where(v < 0.7, v, 0.7 + over * 0.3 / (over + 0.3))


def _primary(rays: _Rays, across: Tensor, down: Tensor, size: int) -> tuple[Vec, Tensor, Tensor, Vec]:
    """Colour (linear, tone-mapped), depth, instance and normal of camera rays through points in [-1, 1]²."""
    tangent = rays["tan"]
    a, b = across * tangent, -(down * tangent)
    f = rays.vec("fx", "fy", "fz")
    d = unit(tuple(f[i] + a * rays["r" + "xyz"[i]] + b * rays["u" + "xyz"[i]] for i in range(3)))
    origin = rays.vec("px", "py", "pz")
    t_floor = torch.where(d[2] < -1e-4, -origin[2] / d[2].clamp(max=-1e-4), INF)
    ground = along(origin, t_floor, d)
    shape = t_floor.shape
    flat_d = tuple(v.reshape(-1) for v in d)
    if rays.shot is None:
        near = _box_pairs(rays.shots, size, ("u0", "u1", "v0", "v1"))
        under = _box_pairs(rays.shots, size, ("s0", "s1", "w0", "w1"))
        starts = tuple(v.expand(shape).reshape(-1) for v in origin)
    else:
        near, under, starts = None, None, origin
    lit, ao = _shadows(rays, ground, rays.shot, under)
    color = [c.reshape(-1) for c in _floor_color(rays, ground, lit, ao)]
    pairs = near if near is not None else _sphere_pairs(rays, starts, flat_d, None)
    best, ray, obj, normal = _closest(rays.shots, starts, flat_d, pairs, t_floor.numel())
    total = torch.minimum(best, t_floor.reshape(-1))
    forward = d[0] * f[0] + d[1] * f[1] + d[2] * f[2]
    depth = total.reshape(shape) * forward
    inst = torch.zeros(t_floor.numel(), dtype=torch.uint8, device=total.device)
    inst[ray] = (obj - obj // rays.shots.slots * rays.shots.slots + 1).to(torch.uint8) if len(obj) else inst[ray]
    full = [torch.zeros_like(total), torch.zeros_like(total), torch.ones_like(total)]
    if len(ray):
        hit_d = tuple(_take(v, ray) for v in flat_d)
        point = along(tuple(_take(v, ray) for v in starts), _take(best, ray), hit_d)
        listed = _Rays(rays.shots, obj // rays.shots.slots)
        shaded = _object_color(listed, point, hit_d, normal, obj)
        for c in range(3):
            color[c][ray] = shaded[c]
            full[c][ray] = normal[c]
    return tuple(_tone(c).reshape(shape) for c in color), depth, inst.reshape(shape), tuple(v.reshape(shape) for v in full)


def _box_pairs(shots: Shots, size: int, names: tuple[str, str, str, str]) -> tuple[Tensor, Tensor]:
    """(ray, object) for every pixel in every object's picture box, objects in the order of their shape."""
    table = shots.objects
    order = torch.argsort(table[OBJ["shape"]], stable=True)
    order = order[_take(table[OBJ["bound"]], order) > 0]
    x0, x1, y0, y1 = (_take(table[OBJ[name]], order) * size for name in names)
    x0, y0 = x0.floor().long(), y0.floor().long()
    wide = (x1.ceil().long() - x0).clamp(min=0)
    high = (y1.ceil().long() - y0).clamp(min=0)
    sizes = wide * high
    which = torch.repeat_interleave(torch.arange(len(order), device=table.device), sizes)
    inside = torch.arange(len(which), device=table.device) - (sizes.cumsum(0) - sizes)[which]
    row = inside // wide[which]
    obj = order[which]
    start = (obj // max(shots.slots, 1)) * (size * size) + y0[which] * size + x0[which]
    return start + row * size + (inside - row * wide[which]), obj


def _sphere_pairs(rays: _Rays, o: Vec, d: Vec, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """(ray, object) where a listed ray passes an object's bounding sphere, other than its own, in the order of shapes."""
    table, slots = rays.shots.objects, rays.shots.slots
    found = []
    for k in range(slots):
        obj = rays.shot * slots + k
        c = tuple(_take(table[OBJ[name]], obj) - o[i] for i, name in enumerate(("cx", "cy", "cz")))
        bound = _take(table[OBJ["bound"]], obj)
        middle = dot(c, d)
        near = (dot(c, c) - middle * middle < bound * bound) & (middle > -bound) & (bound > 0)
        if own is not None:
            near &= obj != own
        ray = near.nonzero()[:, 0]
        found.append((ray, _take(obj, ray)))
    return _by_shape(rays.shots, found, o[0].device)


def _by_shape(shots: Shots, found: list[tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    if not found:
        empty = torch.zeros(0, dtype=torch.long, device=device)
        return empty, empty
    ray, obj = (torch.cat(part) for part in zip(*found, strict=True))
    order = torch.argsort(_take(shots.objects[OBJ["shape"]], obj).to(torch.uint8), stable=True)
    return _take(ray, order), _take(obj, order)


def _runs(shots: Shots, obj: Tensor) -> list[slice]:
    """Where each shape's pairs lie in a list of objects in the order of shapes."""
    shape = _take(shots.objects[OBJ["shape"]], obj).contiguous()
    ends = torch.searchsorted(shape, torch.arange(len(SHAPES), device=shape.device, dtype=shape.dtype), right=True)
    stops = [0, *ends.tolist()]
    return [slice(a, b) for a, b in zip(stops, stops[1:], strict=False)]


def _local(table: Tensor, obj: Tensor, o: Vec, d: Vec | None) -> tuple[Vec, Vec | None]:
    """Points and directions in the frames of the objects."""
    cos, sin, inverse = (_take(table[OBJ[name]], obj) for name in ("cos", "sin", "inverse"))
    x, y, z = (o[i] - _take(table[OBJ[name]], obj) for i, name in enumerate(("cx", "cy", "cz")))
    cos, sin = cos * inverse, sin * inverse
    at = (x * cos + y * sin, y * cos - x * sin, z * inverse)
    if d is None:
        return at, None
    return at, (d[0] * cos + d[1] * sin, d[1] * cos - d[0] * sin, d[2] * inverse)


def _closest(
    shots: Shots, o: Vec, d: Vec, pairs: tuple[Tensor, Tensor], count: int
) -> tuple[Tensor, Tensor, Tensor, Vec]:
    """Nearest hit: distance of every ray (INF if none), then ray, object and world normal of those that hit."""
    ray, obj = pairs
    table = shots.objects
    best = torch.full((count,), INF, device=table.device)
    at, to = _local(table, obj, tuple(_take(v, ray) for v in o), tuple(_take(v, ray) for v in d))
    # start at the point nearest the object's centre: keeps float32 exact enough at any distance
    middle = -dot(at, to) / dot(to, to)
    at = along(at, middle, to)
    times, normals = [], []
    for run, hit in zip(_runs(shots, obj), HIT, strict=True):
        t, normal = hit(tuple(v[run] for v in at), tuple(v[run] for v in to))
        times.append(t)
        normals.append(normal)
    t = torch.cat(times)
    t = torch.where(t < INF * 0.5, t + middle, INF)
    t = torch.where(t > 1e-4, t, INF)
    best.scatter_reduce_(0, ray, t, "amin")
    won = ((t < INF * 0.5) & (t == _take(best, ray))).nonzero()[:, 0]
    ray, obj = _take(ray, won), _take(obj, won)
    x, y, z = (torch.cat([n[i] for n in normals]).index_select(0, won) for i in range(3))
    cos, sin = _take(table[OBJ["cos"]], obj), _take(table[OBJ["sin"]], obj)
    return best, ray, obj, unit((x * cos - y * sin, x * sin + y * cos, z))


def _shadows(
    rays: _Rays, point: Vec, shot: Tensor | None, pairs: tuple[Tensor, Tensor] | None, own: Tensor | None = None, facing: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Share of the key light that reaches each point, and of the light from all sides that nearby objects let through.

    Points on objects name their `own` object, which casts nothing on itself, and whether they face the light at all.
    """
    shots = rays.shots
    table, slots = shots.objects, max(shots.slots, 1)
    total, shape = point[0].numel(), point[0].shape
    flat = tuple(v.reshape(-1) for v in point)
    light, soft = rays.vec("lx", "ly", "lz"), rays["soft"]
    if pairs is None:
        blockers, neighbours = [], []
        for k in range(shots.slots):
            obj = shot * slots + k
            blocks, near = _reach(table, obj, flat, light, soft)
            if own is not None:
                other = obj != own
                blocks, near = blocks & other & facing, near & other
            for found, mask in ((blockers, blocks), (neighbours, near)):
                ray = mask.nonzero()[:, 0]
                found.append((ray, _take(obj, ray)))
        blockers, neighbours = (_by_shape(shots, found, flat[0].device) for found in (blockers, neighbours))
    else:
        ray, obj = pairs
        owner = obj // slots
        light = tuple(_take(shots.shots[SHOT[name]], owner) for name in ("lx", "ly", "lz"))
        start = tuple(_take(v, ray) for v in flat)
        masks = _reach(table, obj, start, light, _take(shots.shots[SHOT["soft"]], owner))
        kept = [mask.nonzero()[:, 0] for mask in masks]
        blockers, neighbours = ((_take(ray, k), _take(obj, k)) for k in kept)
    lit = _spread(*_penumbra(shots, flat, *blockers), slots, total)
    ao = _spread(*_crowding(shots, flat, *neighbours), slots, total)
    return lit.reshape(shape), ao.reshape(shape)


def _reach(table: Tensor, obj: Tensor, point: Vec, light: Vec, soft: Tensor) -> tuple[Tensor, Tensor]:
    """Whether an object can stand between a point and the light; whether it is near enough to darken it."""
    c = tuple(_take(table[OBJ[name]], obj) - point[i] for i, name in enumerate(("cx", "cy", "cz")))
    bound = _take(table[OBJ["bound"]], obj)
    middle, square = dot(c, light), dot(c, c)
    wide = bound + (soft * (middle + bound).clamp(min=0) + 0.025)
    there = bound > 0
    reach = bound + _take(table[OBJ["scale"]], obj) * (AO_LIFT + AO_REACH)
    return (square - middle * middle < wide * wide) & (middle > -bound) & there, (square < reach * reach) & there


def _distance(runs: list[slice], p: Vec) -> Tensor:
    return torch.cat([sdf(tuple(v[run] for v in p)) for run, sdf in zip(runs, SDF, strict=True) if run.stop > run.start])


def _penumbra(shots: Shots, flat: Vec, ray: Tensor, obj: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ray, object and the share of the light that the object lets pass."""
    if not len(ray):
        return ray, obj, torch.ones(0, device=ray.device)
    table, owner = shots.objects, obj // shots.slots
    to = tuple(_take(shots.shots[SHOT[name]], owner) for name in ("lx", "ly", "lz"))
    scale, soft = _take(table[OBJ["scale"]], obj), _take(shots.shots[SHOT["soft"]], owner)
    p, d = _local(table, obj, tuple(_take(v, ray) for v in flat), to)
    d = tuple(v * scale for v in d)  # of length 1: lengths below are in units of the object's radius
    bound = _take(table[OBJ["bound"]], obj) * _take(table[OBJ["inverse"]], obj)
    runs = _runs(shots, obj)
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
    """Ray, object and the share of light from all sides that the object leaves: by its distance from just above the point."""
    if not len(ray):
        return ray, obj, torch.ones(0, device=ray.device)
    p, _ = _local(shots.objects, obj, tuple(_take(v, ray) for v in flat), None)
    near = (1.0 - (_distance(_runs(shots, obj), (p[0], p[1], p[2] + AO_LIFT)) + 0.06) * (1 / (AO_REACH + 0.06))).clamp(0, 1)
    return ray, obj, 1.0 - near * near * 0.62


def _spread(ray: Tensor, obj: Tensor, share: Tensor, slots: int, total: int) -> Tensor:
    """Product over the objects of a ray, always in the order of their slots so that it rounds the same way."""
    out = torch.ones(total, device=share.device)
    slot = obj - obj // slots * slots
    for k in range(slots):
        mine = (slot == k).nonzero()[:, 0]
        rays = _take(ray, mine)  # a ray meets each slot once
        out[rays] = _take(out, rays) * _take(share, mine)
    return out


def _floor_color(rays: _Rays, point: Vec, lit: Tensor, ao: Tensor) -> list[Tensor]:
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


def _sky(rays: _Rays, d: Vec) -> list[Tensor]:
    """What a mirror sees above the floor: backdrop, darker zenith, the key light as a soft box and a strip behind."""
    light = rays.vec("lx", "ly", "lz")
    rise = d[2].clamp(0, 1)
    facing = dot(d, light)
    box = ((facing - 0.90) * (1 / 0.05)).clamp(0, 1)
    box = box * box * (3.0 - box - box)
    strip = ((d[0] * rays["hx"] + d[1] * rays["hy"] - 0.2) * 1.4).clamp(0, 1) * (1.0 - (rise - 0.45).abs() * 5.0).clamp(0, 1)
    level = 0.55 + 0.75 * (rise * 1.6).clamp(max=1) - 0.95 * (rise - 0.35).clamp(min=0)
    return [rays["back_" + n] * level + (2.6 * box + 0.5 * strip) * rays["k" + n] for n in "rgb"]


def _albedo(shots: Shots, obj: Tensor) -> list[Tensor]:
    return [_take(shots.objects[OBJ[name]], obj) for name in "rgb"]


def _diffuse(rays: _Rays, point: Vec, normal: Vec, lit: Tensor) -> list[Tensor]:
    """Irradiance over pi at points of objects: key light, sky from above, the floor's light from below."""
    facing = (dot(normal, rays.vec("lx", "ly", "lz")) * 1.08 - 0.02).clamp(0, 1)
    up = 0.5 + 0.5 * normal[2]
    ground = (point[2] * 0.9).clamp(0, 1)
    low = 0.45 + 0.55 * ground * (2.0 - ground)
    out = []
    for n in "rgb":
        bounce = rays["floor_" + n] * (1.0 - up) * 0.42 * (0.35 + 0.65 * ground)
        out.append(facing * lit * rays["k" + n] * 0.92 + rays["amb_" + n] * (0.12 + 0.26 * up) * (low + (1.0 - low) * up) + bounce)
    return out


def _object_color(rays: _Rays, point: Vec, d: Vec, normal: Vec, obj: Tensor) -> list[Tensor]:
    """Linear radiance of objects: matte rubber with a dull sheen, or tinted metal with one mirror bounce."""
    shots = rays.shots
    light = rays.vec("lx", "ly", "lz")
    lifted = along(point, torch.full_like(point[0], 1e-3), normal)
    lit, ao = _shadows(rays, lifted, rays.shot, None, own=obj, facing=dot(normal, light) > 0)
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
    metal = (_take(shots.objects[OBJ["metal"]], obj) > 0.5).nonzero()[:, 0]
    if not len(metal):
        return out
    mirror = _Rays(shots, rays.shot[metal])
    n_m, d_m = tuple(_take(v, metal) for v in normal), tuple(_take(v, metal) for v in d)
    twice = dot(n_m, d_m) * -2.0
    bounce = along(d_m, twice, n_m)
    seen = _mirror(mirror, tuple(_take(v, metal) for v in lifted), bounce, obj[metal])
    f = fresnel[metal]
    gloss, lit = gloss[metal], lit[metal]
    broad = gloss
    for _ in range(3):
        gloss = gloss * gloss
    for c, n in enumerate("rgb"):
        base = albedo[c][metal]
        tint = base * 0.94 + 0.05
        mirror_color = seen[c] * (tint + (0.9 - tint).clamp(min=0) * f)
        out[c][metal] = base * light_in[c][metal] * 0.20 + mirror_color + (0.22 * broad + 1.5 * gloss) * lit * mirror["k" + n]
    return out


def _mirror(rays: _Rays, o: Vec, d: Vec, own: Tensor) -> list[Tensor]:
    """What reflected rays see: the floor with its shadows, other objects in plain light, else the studio."""
    out = _sky(rays, d)
    down = (d[2] < -1e-3).nonzero()[:, 0]
    if len(down):
        below = _Rays(rays.shots, rays.shot[down])
        o_d, d_d = tuple(_take(v, down) for v in o), tuple(_take(v, down) for v in d)
        t = -o_d[2] / d_d[2]
        ground = along(o_d, t, d_d)
        lit, ao = _shadows(below, ground, below.shot, None)
        dim = 1.08 - 0.62 * (t * (1 / 5.0)).clamp(0, 1)  # far floor is dark: gives flat mirrors a gradient
        for c, color in enumerate(_floor_color(below, ground, lit, ao)):
            out[c][down] = color * dim
    best, ray, obj, normal = _closest(rays.shots, o, d, _sphere_pairs(rays, o, d, own), o[0].numel())
    if len(ray):
        hit = _Rays(rays.shots, rays.shot[ray])
        point = along(tuple(_take(v, ray) for v in o), best[ray], tuple(_take(v, ray) for v in d))
        light_in = _diffuse(hit, point, normal, torch.ones_like(point[0]))
        for c, base in enumerate(_albedo(rays.shots, obj)):
            out[c][ray] = base * light_in[c]
    return out
