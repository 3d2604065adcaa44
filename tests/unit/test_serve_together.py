"""Drawings that share a device: what each gives is what it gives alone."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import small_sd
from helpers import array, noise, tiny_system, white
from sfumato.errors import Cancelled
from sfumato.families.sd.system import open_system
from sfumato.generate import Model, drawing_dtype, load
from sfumato.serve.settings import ModelSpec
from sfumato.serve.worker.costs import Costs, passes, traced
from sfumato.serve.worker.loras import Sent
from sfumato.serve.worker.models import Opened, Shared, _shared, open_model
from sfumato.serve.worker.together import Bench, Together
from sfumato.types import Control, HiRes, Inpaint, Request, Variation

CPU = torch.device("cpu")
# Of 255. In pocket's own precision none: float32, which other machines draw in, moves a value to the other side of .5.
EXACT = drawing_dtype(CPU) != torch.float32
TOLERANCE = 0 if EXACT else 1
ROUNDING = 2  # of small networks in float32 with random weights


def opened(model: Model, rows: int = 16) -> Opened:
    return opened_with(model, Together(Bench(CPU), rows))


def opened_with(model: Model, together: Together, refiner: Model | None = None) -> Opened:
    return Opened("it", model, _shared(model, "it", together, refiner), Sent(model.system.adapters))


def together_of(found: Opened) -> Together:
    return found.shared.system._together


def drawn(found: Opened, requests: list[Request], apart: float = 0.0) -> list:
    """All at once, a thread each, one begun every `apart` seconds."""
    results = [None] * len(requests)

    def draw(k: int) -> None:
        try:
            results[k] = found.shared.generate(
                requests[k], on_step=lambda s: together_of(found).leave() if s.index + 1 == s.total else None
            )
        except BaseException as error:
            results[k] = error
        finally:
            together_of(found).leave()

    threads = [threading.Thread(target=draw, args=(k,)) for k in range(len(requests))]
    for thread in threads:
        thread.start()
        time.sleep(apart)
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a drawing waits for ever"
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def furthest(one, two) -> int:
    return max(int(abs(array(a) - array(b)).max()) for a, b in zip(one.images, two.images, strict=True))


MIXED = [
    Request("a red metal sphere behind a small blue cube", seed=7, steps=6),
    Request("two yellow spheres", seed=1, steps=9, sampler="heun", guidance=5.0),
    Request("a cone", seed=2, steps=4, sampler="euler_a", count=3),
    Request("a large green rubber cylinder left of a tiny torus and a red ball", seed=3, steps=6, guidance=1.0),
    Request("a cube", "metal", seed=4, steps=5, size=(64, 128)),
    Request("a ring", seed=5, steps=4, hires=HiRes(2.0, strength=0.5)),
    Request("a ball", seed=6, steps=6, variation=Variation(9, 0.3), sampler="dpmpp_sde"),
    Request("a blue cube", seed=8, steps=6, image=noise(128, 128), mask=white(128, 128, 20, 20, 90, 90)),
    Request("a can", seed=9, steps=6, image=noise(128, 128), strength=0.6),
    Request("a block", seed=10, steps=6, reuse=2),
    Request("a pill", seed=11, steps=6, guidance_interval=(0.3, 0.8)),
    Request("a can", image=noise(128, 96), mask=white(128, 96, 30, 30, 60, 60), inpaint=Inpaint(padding=8), steps=5,
            size=(128, 128)),
    Request("a cube", seed=12, steps=5, controls=(Control("depth", noise(128, 128)),)),
    Request("a cone", seed=13, steps=6, controls=(Control("depth", noise(128, 128, 1), weight=0.5, end=0.6),)),
]  # fmt: skip


@pytest.fixture(scope="module")
def pocket():
    return opened(load("pocket", "cpu"))


def test_all_kinds_of_requests_at_once_give_what_each_gives_alone(pocket):
    alone = [pocket.model.generate(request) for request in MIXED]
    before = together_of(pocket).calls
    shared = drawn(pocket, MIXED, apart=0.02)
    calls = together_of(pocket).calls - before
    for request, a, b in zip(MIXED, alone, shared, strict=True):
        assert furthest(a, b) <= TOLERANCE, request.prompt
        assert a.recipe["request"] == b.recipe["request"]
    assert calls < 0.7 * sum(
        run.calls * 1 for r in MIXED for run in passes(pocket.model, pocket.model.complete(r))
    )


def test_equal_requests_at_once_share_every_step(pocket):
    requests = [Request("a red cube", seed=k, steps=5) for k in range(4)]
    alone = [pocket.model.generate(request) for request in requests]
    gate = threading.Barrier(4)
    real = Together.__call__

    def start_together(self, *given):
        if threading.get_ident() not in self._drawing and not self._waiting_is_over:
            gate.wait()
        return real(self, *given)

    together = together_of(pocket)
    together._waiting_is_over = False
    before = together.calls, together.called_rows
    Together.__call__ = start_together
    try:
        shared = drawn(pocket, requests)
    finally:
        Together.__call__ = real
    calls, rows = together.calls - before[0], together.called_rows - before[1]
    assert rows == 5 * 8 and calls < 10  # 20 one at a time; a thread that comes late waits for the next call
    assert max(furthest(a, b) for a, b in zip(alone, shared, strict=True)) <= TOLERANCE


def small(kind: str, place) -> Model:
    return Model(
        open_system(small_sd.write(kind, place), CPU, torch.float32, systems=small_sd.SMALL), CPU, kind
    )


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_stable_diffusions_share_too(kind, tmp_path):
    found = opened(small(kind, tmp_path))
    requests = [
        Request("a (red:1.3) cube", seed=1, steps=4, size=(64, 64)),
        Request("a sphere " * 60, "blurry", seed=2, steps=6, size=(64, 64), sampler="euler_a"),
        Request("a [cat:dog:0.5] AND a hat", seed=3, steps=4, size=(64, 64), count=2),
        Request("a ring", seed=4, steps=5, size=(96, 64)),
    ]
    alone = [found.model.generate(request) for request in requests]
    shared = drawn(found, requests)
    assert max(furthest(a, b) for a, b in zip(alone, shared, strict=True)) <= ROUNDING


def test_a_refiner_shares_as_well(tmp_path):
    second = small("sdxl-refiner", tmp_path / "b")
    model = Model(small("sdxl", tmp_path / "a").system, CPU, "it", refiner=second)
    together = Together(Bench(CPU), 16)
    found = opened_with(model, together, _shared(model.refiner, "r", together, None))
    requests = [Request("a cube", seed=k, steps=5 + k, size=(64, 64), refine_at=0.6) for k in range(3)]
    alone = [found.model.generate(request) for request in requests]
    shared = drawn(found, requests, apart=0.05)
    assert max(furthest(a, b) for a, b in zip(alone, shared, strict=True)) <= ROUNDING


def test_loras_of_requests_are_their_own(tmp_path):
    found = opened(Model(tiny_system(), CPU, "tiny", torch.float32))
    lora = lora_file(found.model, tmp_path / "ink.safetensors")
    found.model.attach(lora, 0.0, name="ink")
    found.model.system.adapters.standing = ()
    plain = Request("a red cube", steps=4)
    inked = Request.from_dict({"prompt": "a red cube", "steps": 4, "loras": [{"name": "ink", "weight": 2.0}]})
    alone = [found.model.generate(plain), found.model.generate(inked)]
    assert furthest(*alone) > 20
    shared = drawn(found, [plain, inked, plain, inked])
    assert [furthest(alone[k % 2], shared[k]) for k in range(4)] == [0, 0, 0, 0]


def lora_file(model: Model, place):
    """A LoRA of one layer of the tiny model."""
    from sfumato.storage import save_tensors

    name = (
        "dit.blocks.0.qkv"
        if "dit.blocks.0.qkv.weight" in model.system.denoiser.state_dict()
        else "dit.latent_in"
    )
    rows, columns = model.system.denoiser.state_dict()[f"{name}.weight"].shape
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator)
    save_tensors(place, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
    return place


def test_one_that_stops_or_fails_leaves_the_others_be(pocket):
    request = Request("a red cube", seed=3, steps=8)
    alone = pocket.model.generate(request)
    steps = 0

    def stopping(step):
        nonlocal steps
        steps += 1
        if steps == 3:
            raise Cancelled("enough")

    raised = []

    def stop():
        try:
            pocket.shared.generate(Request("a cone", steps=8), on_step=stopping)
        except Cancelled as error:
            raised.append(error)
        finally:
            together_of(pocket).leave()

    thread = threading.Thread(target=stop)
    thread.start()
    [shared] = drawn(pocket, [request])
    thread.join()
    assert raised and furthest(alone, shared) <= TOLERANCE


class Broken:
    """A network that fails for rows of a kind."""

    def network(self, x, time, cond):
        if (x == 13).any():
            raise RuntimeError("thirteen")
        return x + time.view(-1, 1)


def test_a_call_that_fails_fails_alone():
    from contextlib import nullcontext

    from sfumato.types import Conditioning

    together, owner = Together(Bench(CPU), 16), Broken()
    answers = {}
    gate = threading.Barrier(3)

    def ask(value):
        gate.wait()
        cond = Conditioning(torch.zeros(1, 3, 2))
        try:
            answers[value] = together(
                owner, nullcontext, torch.full((1, 2), float(value)), torch.ones(1), cond, {}
            )
        except RuntimeError as error:
            answers[value] = str(error)
        finally:
            together.leave()

    threads = [threading.Thread(target=ask, args=(value,)) for value in (1, 13, 4)]
    [t.start() for t in threads]
    [t.join(10) for t in threads]
    assert answers[13] == "thirteen"
    assert answers[1].tolist() == [[2.0, 2.0]] and answers[4].tolist() == [[5.0, 5.0]]


def test_seconds_add_up_to_those_of_the_device(pocket):
    bench = together_of(pocket).bench
    spent = {}

    def draw(k):
        bench.spent()
        pocket.shared.generate(Request("a cube", seed=k, steps=6))
        together_of(pocket).leave()
        spent[k] = bench.spent()

    started = time.perf_counter()
    threads = [threading.Thread(target=draw, args=(k,)) for k in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    wall = time.perf_counter() - started
    total = sum(s.network + s.other for s in spent.values())
    assert 0.4 * wall < total <= wall * 1.01
    assert all(s.network > 0 and s.other > 0 for s in spent.values())


# --- costs -----------------------------------------------------------------------------------------------------------


def test_what_a_request_takes_is_counted_before(pocket):
    costs = Costs(pocket.model)
    complete = pocket.model.complete
    one = costs.expected(complete(Request("a", steps=10)))
    two = costs.expected(complete(Request("a", steps=10, count=2)))
    assert (one.pixel_steps, two.pixel_steps) == (128 * 128 * 10, 2 * 128 * 128 * 10)
    assert two.flops["denoise"] == 2 * one.flops["denoise"] > 0
    assert two.need == 2 * one.need > 0
    heun = costs.expected(complete(Request("a", steps=10, sampler="heun")))
    assert heun.runs[0].calls == 19 and heun.runs[0].steps == 10
    part = costs.expected(complete(Request("a", steps=10, image=noise(128, 128), strength=0.5)))
    assert part.runs[0].steps == 5
    assert (
        costs.expected(complete(Request("a", steps=1, size=(512, 512)))).flops["denoise"]
        > one.flops["denoise"]
    )
    large = costs.expected(complete(Request("a", steps=4, hires=HiRes(2.0, steps=6, strength=0.5))))
    assert [(run.size, run.steps) for run in large.runs] == [((128, 128), 4), ((256, 256), 3)]
    assert large.steps == 7 and costs.expected(complete(Request("a", steps=4, count=20))).steps == 12


def test_what_does_not_fit_is_refused_before_it_is_accepted(pocket):
    from sfumato.errors import InputError

    costs = Costs(pocket.model, memory=traced(pocket.model, (128, 128)) * 3)
    costs.expected(pocket.model.complete(Request("a", count=3)))
    with pytest.raises(InputError, match="memory"):
        costs.expected(pocket.model.complete(Request("a", count=4)))


def test_a_model_is_opened_as_it_was_specified(tmp_path):
    together = Together(Bench(CPU), 16)
    found = open_model(ModelSpec("mine", "pocket"), "cpu", together, None)
    assert isinstance(found.shared.system, Shared) and found.sent._adapters is found.model.system.adapters
    facts = found.facts()
    assert (
        facts["name"] == "mine"
        and facts["controls"] == ["depth", "edge"]
        and facts["preset"]["size"] == [128, 128]
    )
    result = found.shared.generate(Request("a cube", steps=2))
    assert result.recipe["model"] == "mine"
