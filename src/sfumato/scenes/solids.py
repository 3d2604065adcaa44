"""The solids in their own frame: ray intersection with normals, and signed distance.

Every function takes vectors as tuples (x, y, z) of equally shaped float32 tensors, in units of the object's radius,
centred on the object, z up. Only additions, products, divisions, square roots and comparisons are used: these are
correctly rounded everywhere, so a result does not depend on where in a tensor, or on which device, a ray is computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.scenes.graph import HALF_HEIGHT, HALF_WIDTH

Vec = tuple[Tensor, ...]  # (x, y, z)
INF = 1e9
BEVEL = 0.08
SPHERE = HALF_HEIGHT["sphere"]
CUBE = HALF_HEIGHT["cube"]
CYL_R, CYL_H = HALF_WIDTH["cylinder"], HALF_HEIGHT["cylinder"]
CONE_R, CONE_H = HALF_WIDTH["cone"], HALF_HEIGHT["cone"]
TUBE = HALF_HEIGHT["torus"]
RING = HALF_WIDTH["torus"] - TUBE
CAP_R = HALF_WIDTH["capsule"]
CAP_H = HALF_HEIGHT["capsule"] - CAP_R
CONE_L = (4 * CONE_H * CONE_H + CONE_R * CONE_R) ** 0.5
BOUND = {
    "sphere": SPHERE,
    "cube": CUBE * 3**0.5,
    "cylinder": (CYL_R**2 + CYL_H**2) ** 0.5,
    "cone": (CONE_R**2 + CONE_H**2) ** 0.5,
    "torus": RING + TUBE,
    "capsule": CAP_R + CAP_H,
}


def dot(a: Vec, b: Vec) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def along(o: Vec, t: Tensor, d: Vec) -> Vec:
    return o[0] + t * d[0], o[1] + t * d[1], o[2] + t * d[2]


def unit(v: Vec) -> Vec:
    scale = 1.0 / dot(v, v).clamp(min=1e-20).sqrt()
    return v[0] * scale, v[1] * scale, v[2] * scale


def _away_from_zero(v: Tensor) -> Tensor:
    return torch.where(v.abs() < 1e-7, 1e-7, v)


def _slab(o: Tensor, d: Tensor, half: float) -> tuple[Tensor, Tensor]:
    inverse = 1.0 / _away_from_zero(d)
    a, b = (-half - o) * inverse, (half - o) * inverse
    return torch.minimum(a, b), torch.maximum(a, b)


def _excess(v: Tensor, half: float) -> Tensor:
    """How far a coordinate reaches into the bevel, with its sign: turns a sharp edge's normal into a rounded one."""
    return torch.sign(v) * (v.abs() - (half - BEVEL)).clamp(min=0)


def hit_sphere(o: Vec, d: Vec) -> tuple[Tensor, Vec]:
    a, b = dot(d, d), dot(o, d)
    disc = b * b - a * (dot(o, o) - SPHERE * SPHERE)
    t = torch.where(disc > 0, (-b - disc.clamp(min=0).sqrt()) / a, INF)
    return t, along(o, t, d)


def hit_cube(o: Vec, d: Vec) -> tuple[Tensor, Vec]:
    (x0, x1), (y0, y1), (z0, z1) = (_slab(o[i], d[i], CUBE) for i in range(3))
    near, far = torch.maximum(torch.maximum(x0, y0), z0), torch.minimum(torch.minimum(x1, y1), z1)
    t = torch.where(near < far, near, INF)
    p = along(o, near, d)
    return t, (_excess(p[0], CUBE), _excess(p[1], CUBE), _excess(p[2], CUBE))


def hit_cylinder(o: Vec, d: Vec) -> tuple[Tensor, Vec]:
    a = (d[0] * d[0] + d[1] * d[1]).clamp(min=1e-12)
    b = o[0] * d[0] + o[1] * d[1]
    disc = b * b - a * (o[0] * o[0] + o[1] * o[1] - CYL_R * CYL_R)
    root = disc.clamp(min=0).sqrt()
    z0, z1 = _slab(o[2], d[2], CYL_H)
    near, far = torch.maximum((-b - root) / a, z0), torch.minimum((-b + root) / a, z1)
    t = torch.where((disc > 0) & (near < far), near, INF)
    x, y, z = along(o, near, d)
    rho = (x * x + y * y).clamp(min=1e-12).sqrt()
    radial = (rho - (CYL_R - BEVEL)).clamp(min=0) / rho
    return t, (x * radial, y * radial, _excess(z, CYL_H))


def hit_cone(o: Vec, d: Vec) -> tuple[Tensor, Vec]:
    k = CONE_R / (2 * CONE_H)  # radius lost per unit of height
    h, dz = (CONE_H - o[2]) * k, -d[2] * k  # radius of the cone at the ray's height, and its change
    a = _away_from_zero(d[0] * d[0] + d[1] * d[1] - dz * dz)
    b = o[0] * d[0] + o[1] * d[1] - h * dz
    disc = b * b - a * (o[0] * o[0] + o[1] * o[1] - h * h)
    root = disc.clamp(min=0).sqrt()
    t = torch.full_like(a, INF)
    for s in ((-b - root) / a, (-b + root) / a):
        z = o[2] + s * d[2]
        t = torch.where((disc > 0) & (z.abs() <= CONE_H) & (s < t), s, t)
    s = (-CONE_H - o[2]) / _away_from_zero(d[2])
    x, y = o[0] + s * d[0], o[1] + s * d[1]
    base = (x * x + y * y <= CONE_R * CONE_R) & (s < t)
    t = torch.where(base, s, t)
    x, y, _ = along(o, t, d)
    side = (2 * CONE_H / CONE_L) / (x * x + y * y).clamp(min=1e-12).sqrt()
    zero, down = torch.zeros_like(t), torch.full_like(t, -1.0)
    up = torch.full_like(t, CONE_R / CONE_L)
    return t, (
        torch.where(base, zero, x * side),
        torch.where(base, zero, y * side),
        torch.where(base, down, up),
    )


def hit_torus(o: Vec, d: Vec) -> tuple[Tensor, Vec]:
    """Sphere tracing of the exact distance inside the slab |z| <= TUBE, which any hit must lie in."""
    speed = dot(d, d).sqrt()
    b = dot(o, d) / (speed * speed)
    reach = ((RING + TUBE) ** 2 - (dot(o, o) - b * b * speed * speed)).clamp(min=0).sqrt() / speed
    z0, z1 = _slab(o[2], d[2], TUBE)
    t, far = torch.maximum(z0, -b - reach), torch.minimum(z1, reach - b)
    step = 1.0 / speed
    for _ in range(14):
        t = t + sdf_torus(along(o, t, d)) * step
    left = sdf_torus(along(o, t, d))
    slow = ((left >= 0.012) & (t < far)).nonzero()[:, 0]  # rays that graze the tube need more steps
    if len(slow):
        start, way, s = tuple(v[slow] for v in o), tuple(v[slow] for v in d), t[slow]
        for _ in range(40):
            s = s + sdf_torus(along(start, s, way)) * step[slow]
        t[slow], left[slow] = s, sdf_torus(along(start, s, way))
    p = along(o, t, d)
    hit = (left < 0.012) & (t < far + 0.02)
    rho = (p[0] * p[0] + p[1] * p[1]).clamp(min=1e-12).sqrt()
    inward = 1.0 - RING / rho
    return torch.where(hit, t, INF), (p[0] * inward, p[1] * inward, p[2])


def hit_capsule(o: Vec, d: Vec) -> tuple[Tensor, Vec]:
    a = (d[0] * d[0] + d[1] * d[1]).clamp(min=1e-12)
    b = o[0] * d[0] + o[1] * d[1]
    rho2 = o[0] * o[0] + o[1] * o[1] - CAP_R * CAP_R
    disc = b * b - a * rho2
    side = (-b - disc.clamp(min=0).sqrt()) / a
    z = o[2] + side * d[2]
    end = z.clamp(-CAP_H, CAP_H)
    oz = o[2] - torch.where(z > 0, CAP_H, -CAP_H)
    b2, a2 = b + oz * d[2], a + d[2] * d[2]
    disc2 = b2 * b2 - a2 * (rho2 + oz * oz)
    ball = torch.where(disc2 > 0, (-b2 - disc2.clamp(min=0).sqrt()) / a2, INF)
    t = torch.where(disc > 0, torch.where(z.abs() <= CAP_H, side, ball), INF)
    x, y, z = along(o, t, d)
    end = z.clamp(-CAP_H, CAP_H)
    return t, (x, y, z - end)


def sdf_sphere(p: Vec) -> Tensor:
    return dot(p, p).sqrt() - SPHERE


def sdf_cube(p: Vec) -> Tensor:
    x, y, z = p[0].abs() - CUBE, p[1].abs() - CUBE, p[2].abs() - CUBE
    inside = torch.maximum(torch.maximum(x, y), z).clamp(max=0)
    x, y, z = x.clamp(min=0), y.clamp(min=0), z.clamp(min=0)
    return (x * x + y * y + z * z).sqrt() + inside


def sdf_cylinder(p: Vec) -> Tensor:
    r = (p[0] * p[0] + p[1] * p[1]).sqrt() - CYL_R
    z = p[2].abs() - CYL_H
    inside = torch.maximum(r, z).clamp(max=0)
    r, z = r.clamp(min=0), z.clamp(min=0)
    return (r * r + z * z).sqrt() + inside


def sdf_cone(p: Vec) -> Tensor:
    """A bound that is exact inside and beside the faces; still convex, which is what shadows need."""
    r = (p[0] * p[0] + p[1] * p[1]).sqrt()
    side = (r - CONE_R) * (2 * CONE_H / CONE_L) + (p[2] + CONE_H) * (CONE_R / CONE_L)
    return torch.maximum(side, -CONE_H - p[2])


def sdf_torus(p: Vec) -> Tensor:
    r = (p[0] * p[0] + p[1] * p[1]).sqrt() - RING
    return (r * r + p[2] * p[2]).sqrt() - TUBE


def sdf_capsule(p: Vec) -> Tensor:
    z = p[2] - p[2].clamp(-CAP_H, CAP_H)
    return (p[0] * p[0] + p[1] * p[1] + z * z).sqrt() - CAP_R


Hit = Callable[[Vec, Vec], tuple[Tensor, Vec]]
HIT: tuple[Hit, ...] = (
    hit_sphere,
    hit_cube,
    hit_cylinder,
    hit_cone,
    hit_torus,
    hit_capsule,
)  # in the order of SHAPES
SDF: tuple[Callable[[Vec], Tensor], ...] = (
    sdf_sphere,
    sdf_cube,
    sdf_cylinder,
    sdf_cone,
    sdf_torus,
    sdf_capsule,
)
