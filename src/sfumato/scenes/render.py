"""Scenes to pictures: a batched ray tracer in plain tensor operations, the same on the CPU and the GPU.

Rays are kept as lists, and each shape is met only by rays near an object of that shape: (ray, object) pairs are listed
first from picture boxes (primary rays) or from bounding spheres (all others), then intersected shape by shape. Pixels
that differ from a neighbour are traced again with four rays.
Only correctly rounded operations are used, so a picture does not depend on the batch it is rendered in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.errors import InputError
from sfumato.scenes.graph import Scene
from sfumato.scenes.pack import Shots, pack
from sfumato.scenes.rays import Rays, box_pairs, closest, sphere_pairs, take, take_all
from sfumato.scenes.shade import floor_color, object_color, shadows
from sfumato.scenes.solids import INF, Vec, along, unit

CHUNK_RAYS = {"cpu": 2**18, "cuda": 2**22}
SUBSAMPLES = ((-0.125, -0.375), (0.375, -0.125), (0.125, 0.375), (-0.375, 0.125))  # rotated grid, in pixels
EDGE = 0.035  # difference in brightness between neighbours from which a pixel is sampled four times


@dataclass(frozen=True)
class Render:
    """rgb: (B, 3, T, H, W) in [0, 1]; depth: (B, T, H, W) along the view axis; instances: (B, T, H, W) uint8, 0 for the
    floor and k for object k - 1; normals: (B, 3, T, H, W), unit, in world axes."""

    rgb: Tensor
    depth: Tensor
    instances: Tensor
    normals: Tensor


def render(
    scenes: Sequence[Scene], size: int = 128, device: str | torch.device = "cpu", *, antialias: bool = True
) -> Render:
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


def _render_shots(shots: Shots, size: int, antialias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count, device = len(shots), shots.shots.device
    line = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (2.0 / size) - 1.0
    across = line.repeat(size)[None]
    down = line.repeat_interleave(size)[None]
    rays = Rays(shots, None)
    color, depth, inst, normal = _primary(rays, across, down, size)
    image = torch.stack(color, 1).reshape(count, 3, size, size)
    inst = inst.reshape(count, size, size)
    if antialias:
        pixel = _edges(image, inst).reshape(-1).nonzero()[:, 0]
        shot = pixel // (size * size)
        spot = pixel - shot * (size * size)
        fine = Rays(shots, shot.repeat(4))
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


def _primary(rays: Rays, across: Tensor, down: Tensor, size: int) -> tuple[Vec, Tensor, Tensor, Vec]:
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
        near = box_pairs(rays.shots, size, ("u0", "u1", "v0", "v1"))
        under = box_pairs(rays.shots, size, ("s0", "s1", "w0", "w1"))
        starts = tuple(v.expand(shape).reshape(-1) for v in origin)
    else:
        near, under, starts = None, None, origin
    lit, ao = shadows(rays, ground, under)
    color = [c.reshape(-1) for c in floor_color(rays, ground, lit, ao)]
    pairs = near if near is not None else sphere_pairs(rays, starts, flat_d, None)
    best, ray, obj, normal = closest(rays.shots, starts, flat_d, pairs, t_floor.numel())
    total = torch.minimum(best, t_floor.reshape(-1))
    forward = d[0] * f[0] + d[1] * f[1] + d[2] * f[2]
    depth = total.reshape(shape) * forward
    inst = torch.zeros(t_floor.numel(), dtype=torch.uint8, device=total.device)
    full = [torch.zeros_like(total), torch.zeros_like(total), torch.ones_like(total)]
    if len(ray):
        hit_d = take_all(flat_d, ray)
        point = along(take_all(starts, ray), take(best, ray), hit_d)
        owner = obj // rays.shots.slots
        inst[ray] = (obj - owner * rays.shots.slots + 1).to(torch.uint8)
        listed = Rays(rays.shots, owner)
        shaded = object_color(listed, point, hit_d, normal, obj)
        for c in range(3):
            color[c][ray] = shaded[c]
            full[c][ray] = normal[c]
    return (
        tuple(_tone(c).reshape(shape) for c in color),
        depth,
        inst.reshape(shape),
        tuple(v.reshape(shape) for v in full),
    )
