"""The renderer: geometry against signed distances, batches, frames, light."""

from dataclasses import replace

import pytest
import torch

from sfumato.errors import InputError
from sfumato.scenes import COLORS, SHAPES, Object, render, sample_scene
from sfumato.scenes.graph import HALF_HEIGHT
from sfumato.scenes.solids import BOUND, HIT, INF, SDF, along, dot, unit


def rays(count, seed):
    """Rays from all around that pass within 1.3 of the origin."""
    generator = torch.Generator().manual_seed(seed)
    o = torch.randn(3, count, generator=generator, dtype=torch.float64)
    o = 6 * o / o.norm(dim=0)
    aim = torch.rand(3, count, generator=generator, dtype=torch.float64) * 2.2 - 1.1
    d = aim - o
    return tuple(o.float()), tuple((d / d.norm(dim=0)).float())


@pytest.mark.parametrize("k", range(len(SHAPES)), ids=SHAPES)
def test_hits_lie_on_the_surface_and_misses_pass_it_by(k):
    o, d = rays(4000, k)
    middle = -dot(o, d)
    near = along(o, middle, d)
    t, normal = HIT[k](near, d)
    hit = t < INF / 2
    assert 500 < hit.sum() < 3900
    p = along(near, t, d)
    on = SDF[k](tuple(v[hit] for v in p))
    tolerance = 0.013 if SHAPES[k] == "torus" else 2e-4
    assert on.abs().max() < tolerance
    steps = torch.linspace(-1.5, 1.5, 400)
    path = tuple(near[i][:, None] + steps * d[i][:, None] for i in range(3))
    least = SDF[k](path).min(1).values
    assert (least[~hit] > -0.02).all()  # a ray that misses never dips inside
    assert (least[hit] < 0.02).all()
    before = SDF[k](along(p, torch.full_like(t, -0.05), d))[hit]
    assert (before > -1e-3).all()  # the first of the crossings
    facing = dot(unit(tuple(v[hit] for v in normal)), tuple(v[hit] for v in d))
    assert (facing < 0.05).float().mean() > 0.99


@pytest.mark.parametrize("shape", SHAPES)
def test_normals_are_the_gradient_of_the_distance(shape):
    k = SHAPES.index(shape)
    o, d = rays(3000, 17)
    near = along(o, -dot(o, d), d)
    t, normal = HIT[k](near, d)
    hit = t < INF / 2
    p = tuple(v[hit].double().requires_grad_() for v in along(near, t, d))
    gradient = torch.autograd.grad(SDF[k](p).sum(), p)
    n = unit(tuple(v[hit].double() for v in normal))
    agreement = dot(unit(gradient), n)
    bevelled = shape in {"cube", "cylinder"}
    assert (agreement > 0.98).double().mean() > (0.7 if bevelled else 0.97)
    assert agreement.min() > 0.5 or shape == "cone"  # a bevel turns a normal by less than 60 degrees


@pytest.mark.parametrize("k", range(len(SHAPES)), ids=SHAPES)
def test_bounds_hold_the_solid(k):
    points = tuple(torch.rand(3, 50_000, generator=torch.Generator().manual_seed(k)) * 4 - 2)
    inside = SDF[k](points) < 0
    reach = dot(points, points).sqrt()[inside].max()
    assert 0.9 * BOUND[SHAPES[k]] < reach < BOUND[SHAPES[k]] + 1e-4
    assert points[2][inside].abs().max() < HALF_HEIGHT[SHAPES[k]] + 1e-4


def test_a_picture_does_not_depend_on_its_batch():
    scenes = [sample_scene(s) for s in range(11)]
    together = render(scenes, 96)
    for order in ([10], [4, 3], [7, 0, 9]):
        apart = render([scenes[k] for k in order], 96)
        for a, b in zip(vars(apart).values(), vars(together).values(), strict=True):
            assert torch.equal(a, b[order])


def test_a_picture_does_not_depend_on_the_threads():
    scenes = [sample_scene(s) for s in range(3)]  # enough rays for an operation to be shared out
    before, threads = render(scenes, 128).rgb, torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(render(scenes, 128).rgb, before)
    finally:
        torch.set_num_threads(threads)


def test_chunks_do_not_show(monkeypatch):
    import sys

    module = sys.modules["sfumato.scenes.render"]
    scenes = [sample_scene(s) for s in range(5)]
    whole = render(scenes, 48)
    monkeypatch.setattr(module, "CHUNK_RAYS", {"cpu": 2 * 48 * 48})
    assert torch.equal(render(scenes, 48).rgb, whole.rgb)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_draws_the_same():
    scenes = [sample_scene(s) for s in range(16)]
    a, b = render(scenes, 128), render(scenes, 128, "cuda")
    assert (a.instances != b.instances.cpu()).float().mean() < 1e-3
    assert (a.rgb - b.rgb.cpu()).abs().mean() < 1e-4


def test_shapes_ranges_and_types():
    scenes = [sample_scene(s, frames=3) for s in range(2)]
    out = render(scenes, 40)
    assert out.rgb.shape == (2, 3, 3, 40, 40) and out.rgb.dtype == torch.float32
    assert out.depth.shape == out.instances.shape == (2, 3, 40, 40)
    assert out.normals.shape == (2, 3, 3, 40, 40) and out.instances.dtype == torch.uint8
    assert out.rgb.min() >= 0 and out.rgb.max() <= 1 and out.rgb.isfinite().all()
    assert (out.depth > 0).all() and out.depth.isfinite().all()
    torch.testing.assert_close(out.normals.norm(dim=1), torch.ones(2, 3, 40, 40), atol=1e-4, rtol=0)
    for scene, masks in zip(scenes, out.instances, strict=True):
        assert set(masks.unique().tolist()) == set(range(len(scene.objects) + 1))


def test_depth_and_normals_agree_with_the_geometry():
    """Points rebuilt from depth lie on the floor or on the sphere, and the sphere's normals point from its centre."""
    scene = next(
        s for s in map(sample_scene, range(500)) if len(s.objects) == 1 and s.objects[0].shape == "sphere"
    )
    out = render([scene], 128, antialias=False)
    depth, mask = out.depth[0, 0].double(), out.instances[0, 0]
    position, right, up, forward = (torch.tensor(v, dtype=torch.float64) for v in scene.camera.axes())
    line = (torch.arange(128, dtype=torch.float64) + 0.5) / 64 - 1
    tangent = torch.tan(torch.tensor(scene.camera.fov / 2, dtype=torch.float64))
    direction = forward + tangent * (line[None, :, None] * right - line[:, None, None] * up)
    points = position + direction * depth[..., None]  # (H, W, 3)
    assert points[mask == 0][:, 2].abs().max() < 1e-3
    offset = points[mask == 1] - torch.tensor(scene.objects[0].position, dtype=torch.float64)
    radius = scene.objects[0].radius * HALF_HEIGHT["sphere"]
    assert (offset.norm(dim=1) - radius).abs().max() < 1e-3
    normals = out.normals[0, :, 0][:, mask == 1].T.double()
    assert (normals - offset / radius).abs().max() < 5e-3


def test_masks_match_between_sizes_of_picture():
    scenes = [sample_scene(s) for s in range(6)]
    small, large = render(scenes, 32).instances, render(scenes, 96).instances
    assert (small == large[..., 1::3, 1::3]).float().mean() > 0.999  # the same rays through the pixel centres


def pair(color="red", material="rubber", shape="sphere"):
    base = sample_scene(2, objects=(1, 1))
    obj = Object(shape, color, material, "large", (0.0, 0.0, HALF_HEIGHT[shape]))
    return replace(base, objects=(obj,))


def test_shadows_darken_the_floor_on_the_side_away_from_the_light():
    scene = pair()
    empty = render([replace(scene, objects=())], 96)
    out = render([scene], 96)
    floor = out.instances[0, 0] == 0
    loss = (empty.rgb - out.rgb)[0, :, 0].mean(0)
    assert loss[floor].min() > -1e-3  # objects only take light from the floor
    assert loss[floor].max() > 0.15
    ys, xs = torch.nonzero(floor & (loss > 0.08), as_tuple=True)
    light = scene.light.direction()
    side = scene.camera.floor_axes(-light[0], -light[1])[0]
    center = scene.camera.project(*scene.objects[0].position)[0] * 96
    assert ((xs.float().mean() - center) > 0) == (side > 0)
    assert len(ys) > 100


def test_light_color_tints_the_picture():
    scene = pair("gray")
    warm = replace(scene, light=replace(scene.light, color=(1.2, 1.0, 0.8)))
    cool = replace(scene, light=replace(scene.light, color=(0.8, 1.0, 1.2)))
    out = render([warm, cool], 48).rgb.mean((2, 3, 4))
    assert out[0, 0] > out[1, 0] and out[0, 2] < out[1, 2]


def test_metal_mirrors_and_rubber_does_not():
    """Moving another object into a metal sphere's view changes it; a rubber one hardly notices."""
    change = {}
    for material in ("metal", "rubber"):
        scene = pair("gray", material)
        other = Object("cube", "red", "rubber", "small", (1.3, -1.2, HALF_HEIGHT["cube"] * 0.56))
        both = render([scene, replace(scene, objects=(*scene.objects, other))], 96, antialias=False)
        mask = (both.instances[0, 0] == 1) & (both.instances[1, 0] == 1)
        redder = both.rgb[:, 0, 0] - both.rgb[:, 1, 0]
        change[material] = (redder[1] - redder[0])[mask].max()
    assert change["metal"] > 0.15 > 0.03 > change["rubber"]


def test_the_colors_of_rubber_are_told_apart_by_eye():
    """The mean colour of each object is nearest to its own name's mean among ten, whatever the light."""
    scenes = [
        replace(sample_scene(seed, objects=(1, 1)), objects=pair(color).objects)
        for color in COLORS
        for seed in range(6)
    ]
    out = render(scenes, 48)
    means = torch.stack(
        [rgb[:, 0][:, m[0] == 1].mean(1) for rgb, m in zip(out.rgb, out.instances, strict=True)]
    )
    centers = means.reshape(len(COLORS), 6, 3).mean(1)
    nearest = torch.cdist(means, centers).argmin(1)
    assert torch.equal(nearest, torch.arange(len(COLORS)).repeat_interleave(6))
    apart = torch.cdist(centers, centers) + torch.eye(len(COLORS))
    assert apart.min() > 0.12


def test_antialiasing_smooths_only_edges():
    scenes = [sample_scene(s) for s in range(4)]
    rough, smooth = render(scenes, 64, antialias=False), render(scenes, 64)
    assert torch.equal(rough.instances, smooth.instances)
    changed = ((rough.rgb - smooth.rgb).abs() > 1e-6).any(1)
    assert 0.005 < changed.float().mean() < 0.25
    fine = torch.nn.functional.avg_pool2d(
        render(scenes, 256, antialias=False).rgb[:, :, 0], 4
    )  # a dense reference
    assert (smooth.rgb[:, :, 0] - fine).abs().mean() < 0.6 * (rough.rgb[:, :, 0] - fine).abs().mean()


def test_moving_objects_move_and_still_ones_do_not():
    scene = next(
        s
        for s in (sample_scene(k, frames=5, objects=(1, 1)) for k in range(100))
        if s.objects[0].velocity != (0.0, 0.0)
    )
    masks = render([scene], 96).instances[0]
    columns = torch.arange(96.0)
    rows = columns[:, None]
    for frame, seconds in enumerate(scene.times()):
        mask = (masks[frame] > 0).float()
        u, v, _ = scene.camera.project(*scene.objects[0].at(seconds)[:3])
        assert abs((mask * (columns + 0.5)).sum() / mask.sum() - 96 * u) < 4
        assert abs((mask * (rows + 0.5)).sum() / mask.sum() - 96 * v) < 6
    still = replace(scene, objects=(replace(scene.objects[0], velocity=(0.0, 0.0), spin=0.0),))
    frames = render([still], 48).rgb[0]
    assert torch.equal(frames[:, 0], frames[:, -1])


def test_the_first_frame_of_a_clip_is_the_picture_of_its_start():
    clip = sample_scene(5, frames=3)
    assert torch.equal(render([clip], 64).rgb[:, :, :1], render([replace(clip, frames=1)], 64).rgb)


def test_an_empty_studio_renders():
    out = render([replace(sample_scene(0), objects=())], 32)
    assert (out.instances == 0).all() and out.rgb.std() > 0


@pytest.mark.parametrize(
    ("scenes", "size", "argument"),
    [
        ([], 64, "scenes"),
        ([sample_scene(0)], 4, "size"),
        ([sample_scene(0)], 10_000, "size"),
        ([sample_scene(0), sample_scene(0, frames=2)], 64, "scenes"),
    ],
)
def test_bad_arguments_are_named(scenes, size, argument):
    with pytest.raises(InputError) as caught:
        render(scenes, size)
    assert caught.value.argument == argument
