"""Deep features used again: which calls are whole, what the others compute, and that exact stays exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from helpers import CPU, PROMPT, TINY, apart, tiny_system
from sfumato.drawing.sample import noise_of
from sfumato.errors import InputError
from sfumato.generate import Model
from sfumato.nn.dit import DiT, DiTConfig
from sfumato.nn.packed import pack
from sfumato.nn.transformer import rms_norm
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.sampling.reuse import Reuse, extrapolated
from sfumato.types import Conditioning, Request

UNETS = {
    "three levels": UNetConfig(
        channels=(16, 32, 32), depths=(1, 1, 0), heads=(2, 2, 2), context=24, groups=8, vector=10
    ),
    "no attention above": UNetConfig(
        channels=(16, 32), depths=(0, 2), heads=(2, 2), context=24, groups=8, vector=10, linear=True
    ),
    "one block a level": UNetConfig(
        channels=(16, 32), depths=(1, 1), heads=(2, 2), context=24, groups=8, vector=10, resnets=1
    ),
}


def unet(name: str) -> UNet:
    torch.manual_seed(0)
    return UNet(UNETS[name]).eval().requires_grad_(False)


def question(
    config: UNetConfig, B: int = 2, size: tuple[int, int] = (8, 12), seed: int = 1
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": draw(B, 4, *size),
        "time": draw(B) * 100 + 500,
        "context": draw(B, 5, config.context),
        "vector": draw(B, config.vector),
    }


# --- the U-Net ---------------------------------------------------------------------------------------------------


def inputs_of_the_blocks_above(net: UNet, given: dict[str, Tensor]) -> list[Tensor]:
    """What enters each residual block of the way up, seen from outside."""
    seen: list[Tensor] = []
    handles = [
        resnet.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        for level in net.up_blocks
        for resnet in level.resnets
    ]
    net(**given)
    for handle in handles:
        handle.remove()
    return seen


def deepcache(net: UNet, before: dict[str, Tensor], now: dict[str, Tensor]) -> Tensor:
    """The skipped step by its definition, of the network's modules alone: at the finest level the first block D and the
    last two U are those of this step, and what the second last takes from below is the earlier step's."""
    config = net.config
    entering = inputs_of_the_blocks_above(net, before)[-2]
    cached = entering[:, : entering.shape[1] - config.channels[0]]  # without the skip that was joined to it
    half = config.channels[0] // 2
    frequencies = 10_000 ** (-torch.arange(half) / half)
    angles = now["time"][:, None] * frequencies
    waves = torch.cat([angles.cos(), angles.sin()], 1)
    time = functional.silu(net.time_embedding(waves) + net.add_embedding(now["vector"]))
    finest, last = net.down_blocks[0], net.up_blocks[-1]

    def block(level, i, x):
        x = level.resnets[i](x, time)
        return level.attentions[i](x, now["context"]) if len(level.attentions) else x

    first_skip = net.conv_in(now["x"])
    second_skip = block(finest, 0, first_skip)
    count = len(last.resnets)
    h = block(last, count - 2, torch.cat([cached, second_skip], 1))
    h = block(last, count - 1, torch.cat([h, first_skip], 1))
    return net.conv_out(functional.silu(net.conv_norm_out(h)))


@pytest.mark.parametrize("size", [(8, 12), (7, 5)], ids=str)
@pytest.mark.parametrize("name", UNETS)
def test_a_skipped_call_is_deepcache_s(name, size):
    net = unet(name)
    before, now = question(net.config, size=size), question(net.config, size=size, seed=2)
    _, deep = net.forward_with_deep(**before)
    answer, same = net.forward_with_deep(**now, deep=deep)
    torch.testing.assert_close(answer, deepcache(net, before, now), atol=1e-5, rtol=1e-5)
    assert same is deep
    assert (answer - net(**now)).abs().max() > 1e-3


@pytest.mark.parametrize("name", UNETS)
def test_a_call_s_own_deep_features_give_its_own_answer_to_the_bit(name):
    net, given = unet(name), question(UNETS[name])
    whole, deep = net.forward_with_deep(**given)
    before = deep.clone()
    assert torch.equal(whole, net(**given))
    assert torch.equal(net.forward_with_deep(**given, deep=deep)[0], whole)
    assert torch.equal(deep, before)


def test_the_seam_survives_packing():
    net, given, other = (
        unet("three levels"),
        question(UNETS["three levels"]),
        question(UNETS["three levels"], seed=2),
    )
    _, deep = net.forward_with_deep(**given)
    expected = net.forward_with_deep(**other, deep=deep)[0]
    assert pack(net) > 0
    whole, deep = net.forward_with_deep(**given)
    assert torch.equal(whole, net(**given))
    torch.testing.assert_close(net.forward_with_deep(**other, deep=deep)[0], expected, atol=1e-4, rtol=1e-4)


def test_a_skipped_call_runs_three_blocks_of_the_finest_level():
    net, ran = unet("three levels"), []
    for name, module in net.named_modules():
        if name.rpartition(".")[0].endswith(".resnets"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    given = question(net.config)
    _, deep = net.forward_with_deep(**given)
    ran.clear()
    net.forward_with_deep(**given, deep=deep)
    assert ran == ["down_blocks.0.resnets.0", "up_blocks.2.resnets.1", "up_blocks.2.resnets.2"]


def test_residuals_of_a_control_network_reach_the_skips_that_are_left():
    net, given = unet("three levels"), question(UNETS["three levels"])
    down = [torch.randn(2, C, 8 // 2**level, 12 // 2**level) for C, level in net.config.skips]
    mid = torch.randn(2, 32, 2, 3)
    whole, deep = net.forward_with_deep(**given, down_residuals=down, mid_residual=mid)
    assert torch.equal(
        net.forward_with_deep(**given, down_residuals=down, mid_residual=mid, deep=deep)[0], whole
    )
    assert (net.forward_with_deep(**given, deep=deep)[0] - whole).abs().max() > 1e-3


# --- the transformer -----------------------------------------------------------------------------------------------


def dit() -> DiT:
    torch.manual_seed(0)
    net = DiT(DiTConfig(4, patch=2, width=64, depth=3, heads=2, text_width=16)).eval().requires_grad_(False)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def asked(seed: int = 0, B: int = 2) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(B, 5, dtype=torch.bool)
    mask[0, 3:] = False
    tokens = torch.randn(B, 5, 16, generator=generator)
    return (
        torch.randn(B, 4, 1, 8, 4, generator=generator),
        torch.tensor(0.7 - 0.1 * seed),
        Conditioning(tokens, mask),
    )


def test_a_transformer_s_own_deviation_gives_its_own_answer():
    net = dit()
    whole, deep = net.forward_with_deep(*asked())
    assert torch.equal(whole, net(*asked()))
    torch.testing.assert_close(net.forward_with_deep(*asked(), deep)[0], whole, atol=1e-5, rtol=1e-4)


def test_a_skipped_call_of_a_transformer_adds_the_deviation_to_its_own_tokens():
    """Seen from outside: what enters the first block, what leaves the last, and the layers after."""
    net, seen = dit(), []
    net.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net.blocks[-1].register_forward_hook(lambda _, args, out: seen.append(out))
    _, deep = net.forward_with_deep(*asked())
    torch.testing.assert_close(deep, seen[1] - seen[0])
    seen.clear()
    answer, _ = net.forward_with_deep(*asked(1), deep)
    assert not seen  # no block ran
    net(*asked(1))
    h = (seen[0] + deep)[:, 5:]
    _, time, cond = asked(1)
    waves = 1000 * time * 10_000 ** (-torch.arange(128) / 128)
    pooled = torch.stack([cond.tokens[0, :3].mean(0), cond.tokens[1].mean(0)])
    told = functional.silu(net.time_in(torch.cat([waves.cos(), waves.sin()])) + net.pooled_in(pooled))
    shift, scale = net.final_modulation(told)[:, None].chunk(2, -1)
    cells = net.latent_out(rms_norm(h) * (1 + scale) + shift).view(2, 4, 2, 4, 2, 2)  # rows, columns, C, p, p
    torch.testing.assert_close(
        answer[:, :, 0], cells.permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 8, 4), atol=1e-4, rtol=1e-4
    )


# --- which calls are whole -----------------------------------------------------------------------------------------


class Recorder:
    """A network whose deep features are a polynomial of the time, one for each row; the answer is those features."""

    def __init__(self, degree: int = 0):
        self.degree, self.whole = degree, []

    def __call__(self, x, time, cond, deep):
        if deep is None:
            self.whole.append(float(time[0]))
            deep = (cond[:, None] * time[:, None] ** self.degree).expand(-1, 3)
        return deep + 0 * x, deep


def calls(network: Reuse, times: list[float], rows: list[int]) -> list[Tensor]:
    return [
        network(torch.zeros(n, 3), torch.full((n,), t), torch.arange(1.0, n + 1))
        for t, n in zip(times, rows, strict=True)
    ]


@pytest.mark.parametrize("every, whole", [(1, [9, 8, 7, 6, 5]), (2, [9, 7, 5]), (3, [9, 6]), (10, [9])])
def test_every_nth_call_is_whole(every, whole):
    seen = Recorder()
    calls(Reuse(seen, every), [9, 8, 7, 6, 5], [2] * 5)
    assert seen.whole == whole


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_forecast_is_exact_for_polynomials_of_its_order(order):
    times = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]
    for degree in range(4):
        got = calls(Reuse(Recorder(degree), 2, order), times, [2] * 7)[-2]  # at 4, after 9, 7 and 5
        exact = torch.tensor([[1.0], [2.0]]) * 4.0**degree
        assert torch.allclose(got, exact.expand(2, 3), rtol=1e-5) is (degree <= order)


def test_fewer_rows_go_on_with_the_first_and_more_are_computed_whole():
    seen = Recorder(1)
    answers = calls(Reuse(seen, 3, 1), [9, 8, 7, 6, 5, 4], [2, 4, 2, 4, 2, 2])
    assert seen.whole == [9, 8, 5]
    assert [len(answer) for answer in answers] == [2, 4, 2, 4, 2, 2]
    assert torch.equal(answers[2][:, 0], torch.tensor([8.0, 16.0]))
    assert torch.allclose(answers[5][:, 0], torch.tensor([4.0, 8.0]))  # from 8 and 5


def test_two_whole_calls_at_one_time_count_once():
    """A sampler may ask twice at one level; a line through both points would have no slope."""
    assert torch.isfinite(torch.stack(calls(Reuse(Recorder(), 2, 2), [9, 8, 9, 8, 7, 6], [1] * 6))).all()


def test_extrapolation_of_one_point_is_that_point():
    value = torch.ones(3)
    assert extrapolated([(2.0, value)], 1.0) is value


@pytest.mark.parametrize("every, order", [(0, 0), (2, -1)])
def test_numbers_that_mean_nothing_are_refused(every, order):
    with pytest.raises(InputError):
        Reuse(Recorder(), every, order)


def test_a_u_net_without_vector_keeps_its_seam():
    config = replace(UNETS["three levels"], vector=0)
    net, given = UNet(config).eval(), question(config)
    del given["vector"]
    with torch.no_grad():
        whole, deep = net.forward_with_deep(**given)
        assert torch.equal(net.forward_with_deep(**given, deep=deep)[0], whole)


# --- requests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(tiny_system(), CPU, "tiny", dtype=torch.float32)


def test_reuse_of_one_is_exact_to_the_bit(model):
    for sampler in ("dpmpp_2m", "heun", "dpmpp_sde"):
        exact = Request(PROMPT, negative="blue", seed=3, steps=6, sampler=sampler)
        one, two = (model.generate(request).images[0] for request in (exact, replace(exact, reuse=1)))
        assert one.tobytes() == two.tobytes()
        assert apart(one, model.generate(replace(exact, reuse=2)).images[0]) > 3


def test_reuse_by_hand(model):
    """Euler, every other call with the forecast of what the blocks add: first as it was, then along a line."""
    request = model.complete(Request(PROMPT, seed=4, sampler="euler", steps=4, guidance=1.0, reuse=2))
    cond = model.condition(request)
    wanted = cond.change(lambda rows: rows[:1])
    net, x = model.system.denoiser.dit, noise_of(model, [4], (4, 1, 8, 8), request).initial()
    past: list[Tensor] = []
    with torch.no_grad():
        for step, sigma in enumerate((1.0, 0.75, 0.5, 0.25)):
            forecast = (
                None if step % 2 == 0 else past[0] if step == 1 else past[1] + 0.5 * (past[1] - past[0])
            )
            velocity, deep = net.forward_with_deep(x, torch.tensor(sigma), wanted, forecast)
            if step % 2 == 0:
                past.append(deep)
            x = x - 0.25 * velocity
    torch.testing.assert_close(model.sample(cond, [4], request), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", [{"reuse": 2}, {"reuse": 3, "guidance_interval": (0.2, 0.8)}], ids=str)
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_a", "heun"])
def test_an_approximate_picture_depends_on_its_seed_alone(model, sampler, fields):
    request = Request(PROMPT, negative="blue", seed=7, count=3, steps=8, sampler=sampler, **fields)
    together, again = model.generate(request).images, model.generate(request).images
    assert [image.tobytes() for image in together] == [image.tobytes() for image in again]
    for k, image in enumerate(together):
        assert apart(model.generate(request.part(k)).images[0], image) <= 1
    assert apart(together[0], together[1]) > 5


def test_the_recipe_says_what_was_approximate(model):
    fields = {"reuse": 2, "guidance_interval": (0.25, 1.0)}
    result = model.generate(Request(PROMPT, **fields))
    assert result.recipe["request"]["reuse"] == 2
    again = model.generate(Request.from_dict({**result.recipe["request"], "guidance_interval": [0.25, 1.0]}))
    assert again.images[0].tobytes() == result.images[0].tobytes()
    assert not {"reuse", "guidance_interval"} & model.generate(Request(PROMPT)).recipe["request"].keys()


def test_the_request_s_interval_goes_before_the_preset_s(model):
    """Outside it the answer is that without guidance; the preset's is overruled."""
    resting = Model(
        tiny_system(replace(TINY, preset=replace(TINY.preset, interval=(0.0, 0.1)))), CPU, dtype=torch.float32
    )
    for asked, guided in ((None, (False, False)), ((0.2, 0.5), (True, False)), ((0.5, 1.0), (False, True))):
        request = Request(PROMPT, negative="blue", guidance=4.0, guidance_interval=asked)
        cond, x = resting.condition(request), torch.randn(1, 4, 1, 8, 8)
        for sigma, differs in zip((0.4, 0.9), guided, strict=True):
            level = torch.tensor(sigma, dtype=torch.float64)
            answers = [resting.denoiser(cond, told)(x, level) for told in (request, 1.0)]
            assert torch.equal(*answers) is not differs


def test_a_network_without_a_seam_refuses_reuse(model):
    class Whole:
        split = None

        def __getattr__(self, name):
            return getattr(model.system, name)

    with pytest.raises(InputError, match="no deep features to reuse") as caught:
        Model(Whole(), CPU, dtype=torch.float32).generate(Request(PROMPT, reuse=2))
    assert caught.value.argument == "reuse"
    assert Model(Whole(), CPU, dtype=torch.float32).complete(Request(PROMPT, reuse=1)).reuse == 1
