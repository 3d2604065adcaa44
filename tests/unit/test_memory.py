"""The memory plan is what is allocated; what is kept in memory changes no number."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import weakref
from dataclasses import replace

import pytest
import torch

from sfumato import load, planning
from sfumato.autoencoder.kl import AutoencoderKL
from sfumato.checkpoint.fill import Streamed
from sfumato.checkpoint.rules import shapes
from sfumato.cli.app import run
from sfumato.cli.parse import size_in_bytes
from sfumato.errors import CheckpointError, InputError
from sfumato.families.published import networks
from sfumato.families.sd.family import FAMILY
from sfumato.families.sd.shapes import SYSTEMS
from sfumato.families.sd.system import open_system
from sfumato.generate import Model
from sfumato.memory import OFFLOADS, LiveBytes, MemoryPlan, Stage, available, peak_resident, resident, tracing
from sfumato.nn.attention import attention, attention_bytes
from sfumato.nn.packed import can_pack
from sfumato.nn.unet import UNet, UNetConfig
from sfumato.storage import load_tensors, save_tensors
from sfumato.text.clip import ClipConfig, ClipTextEncoder
from sfumato.types import Request
from small_sd import SMALL as TINY
from small_sd import write

CPU = torch.device("cpu")
SD1 = SYSTEMS["sd1"]
SMALL = {
    "sd1": replace(
        SD1,
        unet=UNetConfig(4, (64, 128), (1, 1), 1, (2, 2), context=32),
        vae=replace(SD1.vae, widths=(32, 64, 64)),
        text=(replace(SD1.text[0], config=ClipConfig(32, 2, 2, "quick_gelu")),),
    )
}
REQUEST = Request("a (small:1.2) red fox", negative="blurry", seed=3, steps=2, sampler="euler", size=(64, 96))
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def networks_of(system) -> dict[str, torch.nn.Module]:
    parts = {"unet": UNet(system.unet), "vae": AutoencoderKL(system.vae)}
    return parts | {part.name: ClipTextEncoder(part.config) for part in system.text}


def names_of(parts) -> dict[str, torch.Tensor]:
    ours = {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
    return {name: tensor for name, tensor in ours.items() if "position_ids" not in name}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A single file of a small SD 1 with random weights, in half precision."""
    torch.manual_seed(0)
    ours = names_of(networks_of(SMALL["sd1"]))
    theirs = FAMILY.file_map(SMALL["sd1"]).to_theirs({name: t.half() for name, t in ours.items()})
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    save_tensors(path, dict(theirs))
    return path


def opened(path, dtype=torch.float32, offload="none") -> Model:
    return Model(open_system(path, CPU, dtype, offload=offload, systems=SMALL), CPU, "small")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file of SD 1's full size, of zeros that take no place on the disk."""
    with torch.device("meta"):
        ours = names_of(networks_of(SD1))
    header, end = {}, 0
    for name, shape in shapes(FAMILY.file_map(SD1).to_theirs(ours)).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = tmp_path_factory.mktemp("published") / "sd1.safetensors"
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return path


# --- counting ----------------------------------------------------------------------------------------------------


def test_a_trace_counts_what_is_alive():
    with tracing({}) as tracer:
        kept = torch.empty(1000, dtype=torch.float32)
        assert (tracer.now, tracer.peak) == (4000, 4000)

        def work() -> torch.Tensor:
            a = kept + 1  # 4000
            b = a.double()  # and 8000
            view = b[10:]
            del a
            return view.sum(0, keepdim=True).float()

        answer, took = tracer.worst(work)
        assert took == 12_000
        assert tracer.now == 4004 and answer.shape == (1,)
        del answer
        assert (tracer.now, tracer.peak) == (4000, 16_000)
    assert torch.ones(2).sum() == 2  # tensors are real again


@pytest.mark.parametrize("dtype, apart", [*((t, False) for t in TYPES), (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize(
    "heads, queries, keys, width",
    [(4, 2048, 2048, 40), (8, 1024, 77, 80), (2, 64, 64, 64), (8, 600, 600, 64), (4, 8192, 16, 160)],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("one_thread")
def test_attention_allocates_what_it_says(dtype, apart, heads, queries, keys, width, masked):
    q, k, v = (
        torch.randn(2, tokens, heads * width).to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2)
        for tokens in (queries, keys, keys)
    )
    if apart:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    mask = torch.full((2, keys), 3.0) if masked else None
    with torch.inference_mode(), LiveBytes() as real:
        attention(q, k, v, mask)
    assert attention_bytes(q, k, v, mask) == pytest.approx(real.peak, rel=0.02, abs=4096)


@pytest.mark.parametrize("dtype", [t for t in TYPES if t != torch.float16], ids=str)
@pytest.mark.parametrize("size", [(64, 96), (256, 256)])
@pytest.mark.usefixtures("one_thread")
def test_the_trace_of_a_small_system_is_what_it_allocates(file, dtype, size):
    """The U-Net in a guided step, with real numbers and without."""
    model = opened(file, dtype)
    request = model.complete(replace(REQUEST, size=size))
    stages = {s.name: s for s in model.system.trace(request, size, 1, encodes=False, offload="model")}
    cond = model.condition(request)
    denoise = model.denoiser(cond, request)
    x = torch.randn(1, *model.system.latent_shape(1, size[1], size[0]))
    with torch.inference_mode(), LiveBytes() as real:
        denoise(x, torch.tensor(2.0))
    assert stages["denoise"].activations == pytest.approx(real.peak, rel=0.05)


def test_the_work_is_counted_whatever_engine_does_it(file):
    model = opened(file)
    request = model.complete(REQUEST)
    traces = [
        replace(model.system, engine=engine).trace(request, request.size, 1, encodes=False, offload="none")
        for engine in ("torch", "openvino")
    ]
    assert [stage.flops for stage in traces[0]] == [stage.flops for stage in traces[1]]


def test_weights_are_counted_as_they_are_kept(file):
    """fp32 from a half-precision file: twice its bytes, and packed upsampling beside the plain one."""
    model = opened(file)
    request = model.complete(REQUEST)
    numbers = sum(math.prod(shape) for part in model.system.parts.values() for shape in shapes(part).values())
    upsample = next(
        m.plain if hasattr(m, "plain") else m for m in model.system.denoiser.up_blocks[0].upsamplers
    )
    extra = upsample.conv.weight.numel() * 16 // 9 if can_pack(torch.empty(0)) else 0
    for offload in OFFLOADS:
        stages = {s.name: s for s in model.system.trace(request, (64, 96), 1, encodes=True, offload=offload)}
        assert list(stages) == ["load", "text", "encode", "denoise", "decode"]
        if offload == "none":
            assert stages["decode"].weights == stages["text"].weights
            assert stages["text"].weights == pytest.approx(4 * (numbers + extra), rel=0.01)
        if offload == "model":
            apart = [stages[name].weights for name in ("text", "denoise", "decode")]
            assert sum(apart) == pytest.approx(4 * (numbers + extra), rel=0.01)
        if offload == "sequential":
            assert stages["denoise"].weights < 0.02 * apart[1]


# --- what is kept ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_is_kept_changes_no_number(file, dtype):
    pictures = {}
    for offload in OFFLOADS:
        model = opened(file, dtype, offload)
        first, again = (model.generate(REQUEST).images[0].tobytes() for _ in range(2))
        assert first == again
        latent = model.sample(model.condition(REQUEST), [3], model.complete(REQUEST))
        pictures[offload] = first, latent
    for offload in OFFLOADS[1:]:
        assert pictures[offload][0] == pictures["none"][0]
        assert torch.equal(pictures[offload][1], pictures["none"][1])


def test_each_level_keeps_what_it_says(file):
    every = opened(file).system.networks
    assert sorted(every.held()) == ["autoencoder", "denoiser", "text"]
    for offload in ("model", "sequential"):
        model = opened(file, offload=offload)
        held = model.system.networks.held
        assert held() == ()
        cond = model.condition(REQUEST)
        assert held() == ("text",)
        text = weakref.ref(model.system.text.encoders[0])
        latent = model.sample(cond, [3], model.complete(REQUEST))
        assert held() == ("denoiser",) and text() is None
        model.decode(latent)
        assert held() == ("autoencoder",)
    layers = [m for m in opened(file, offload="sequential").system.denoiser.parameters()]
    assert sum(p.numel() for p in layers) < 0.02 * sum(
        p.numel() for p in UNet(SMALL["sd1"].unet).parameters()
    )


def test_threads_share_a_model_that_gives_networks_up(file):
    """One draws while another reads prompts: each network goes and comes back under the other's hands."""
    model = opened(file, offload="model")
    alone = [opened(file).generate(replace(REQUEST, seed=seed)).images[0].tobytes() for seed in range(4)]
    drawn: dict[int, bytes] = {}

    def draw(seed: int) -> None:
        drawn[seed] = model.generate(replace(REQUEST, seed=seed)).images[0].tobytes()

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [drawn[seed] for seed in range(4)] == alone


def test_a_damaged_layer_is_named_before_it_is_used(file, tmp_path):
    tensors = load_tensors(file)
    name = next(n for n in tensors if n.endswith("attn1.to_q.weight"))
    tensors[name][0, 0] = math.nan
    save_tensors(tmp_path / "bad.safetensors", tensors)
    for offload in OFFLOADS:
        with pytest.raises(CheckpointError, match=rf"bad.safetensors \(unet\): {re.escape(name)} holds NaN"):
            opened(tmp_path / "bad.safetensors", offload=offload).generate(REQUEST)


def test_an_unknown_level_is_refused(file):
    with pytest.raises(InputError, match="offload must be one of none, model, sequential, not 'layers'"):
        opened(file, offload="layers")


def test_hashes_are_those_of_the_files_and_read_once(file, tmp_path, monkeypatch):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(file.read_bytes())
    first = opened(copy).hashes
    assert first == opened(copy, torch.bfloat16, "sequential").hashes == opened(file).hashes
    known = len(networks._HASHES)
    assert opened(copy).hashes == first and len(networks._HASHES) == known
    tensors = load_tensors(copy)
    name = next(n for n in tensors if n.endswith("out.2.bias"))
    tensors[name] += 1
    save_tensors(copy, tensors)
    changed = opened(copy).hashes
    assert changed["denoiser"] != first["denoiser"] and changed["autoencoder"] == first["autoencoder"]


# --- choosing ----------------------------------------------------------------------------------------------------


@pytest.mark.full  # minutes: whole networks are traced
def test_the_first_level_that_fits_is_taken(file):
    model = opened(file, offload="model")
    peaks = {level: planning.plan(model, REQUEST, level).peak for level in OFFLOADS}
    assert peaks["none"] > peaks["model"] > peaks["sequential"]
    assert planning.plan(model, REQUEST).offload == "none"
    for level in OFFLOADS:
        limit = peaks[level] + (1 << 20)
        slack = {name: replace(planning.plan(model, REQUEST, name, limit), limit=limit) for name in OFFLOADS}
        expected = next((name for name in OFFLOADS if slack[name].fits), None)
        found = planning.plan(model, REQUEST, limit=limit)
        assert found.offload == expected if expected else not found.fits
    followed = planning.follow(model, planning.plan(model, REQUEST, "sequential"))
    assert followed.system.offload == "sequential"
    assert (
        followed.generate(REQUEST).images[0].tobytes() == opened(file).generate(REQUEST).images[0].tobytes()
    )


def test_as_many_layers_stay_in_memory_as_fit(file, monkeypatch):
    monkeypatch.setattr(planning, "FILLED", 1.0)  # the networks are small beside the program
    monkeypatch.setattr(planning, "resident", lambda: 0)
    model = opened(file, offload="model")
    streamed = planning.plan(model, REQUEST, "sequential")
    limit = (streamed.peak + planning.plan(model, REQUEST, "model").peak) // 2
    found = planning.filled(model, REQUEST, replace(streamed, limit=limit))
    weights = {
        plan: {stage.name: stage.weights for stage in plan.stages}["denoise"] for plan in (streamed, found)
    }
    assert found.offload == "sequential" and found.kept > 0 and found.fits
    assert weights[found] - weights[streamed] == pytest.approx(found.kept, rel=0.2)
    followed = planning.follow(model, found)
    assert any(isinstance(module, Streamed) for module in followed.system.denoiser.modules())
    assert followed.generate(REQUEST).images[0].tobytes() == model.generate(REQUEST).images[0].tobytes()
    none_to_spare = replace(streamed, limit=streamed.peak)
    assert planning.filled(model, REQUEST, none_to_spare) is none_to_spare


@pytest.mark.full
def test_a_refiner_is_counted(tmp_path, monkeypatch):
    """Everything is kept, so while one model works the other's networks are beside it; and no stage is forgotten."""
    for kind in ("sdxl", "sdxl-refiner"):
        monkeypatch.setitem(SYSTEMS, kind, TINY[kind])
    base, refiner = (str(write(kind, tmp_path / kind)) for kind in ("sdxl", "sdxl-refiner"))
    request = Request("a cat", size=(32, 32), steps=2)

    def stages(*arguments, offload, **options):
        found = planning.plan(load(*arguments, "cpu", dtype=torch.float32, **options), request, offload)
        return {stage.name: stage for stage in found.stages}

    for offload in ("none", "model"):
        alone, other = stages(base, offload=offload), stages(refiner, offload=offload)
        both = stages(base, offload=offload, refiner=refiner)
        assert set(both) == {*alone, "refiner load", "refiner text", "refiner denoise"}
        most = {
            name: max(s.weights for s in of.values()) for name, of in (("base", alone), ("refiner", other))
        }
        assert both["denoise"].weights == alone["denoise"].weights + most["refiner"]
        assert both["refiner denoise"].weights == other["denoise"].weights + most["base"]
        assert both["refiner denoise"].activations == other["denoise"].activations
    models = [load(model, "cpu", dtype=torch.float32) for model in (base, refiner)]
    denoisers = sum(p.numel() * 4 for model in models for p in model.system.denoiser.parameters())
    assert stages(base, offload="none", refiner=refiner)["denoise"].weights > denoisers


def test_a_plan_adds_up():
    plan = MemoryPlan("cpu", "float32", "none", 100, (Stage("a", 10, 5), Stage("b", 10, 20)), 1000, 130)
    assert (plan.peak, plan.allowed, plan.fits) == (130, 130, True)
    assert not replace(plan, limit=129).fits and not replace(plan, available=129, limit=None).fits
    assert plan.to_dict()["stages"]["b"] == {"weights": 10, "activations": 20, "peak": 130}


def test_the_machine_and_the_process_are_read():
    assert 0 < resident() <= peak_resident() < available(CPU)


@pytest.mark.parametrize(
    "text, count",
    [("6GB", 6 * 10**9), ("6 gib", 6 * 2**30), ("1.5G", 3 * 2**29), ("800MiB", 800 * 2**20), ("9k", 9216)],
)
def test_sizes_of_memory(text, count):
    assert size_in_bytes("memory", text) == count


@pytest.mark.parametrize("text", ["", "6", "GB", "-6GB", "6TB", "nanGB", "1e9GB", "6GBit", "6GB 7"])
def test_what_is_no_size_of_memory(text):
    with pytest.raises(InputError, match="memory must be like 6GB or 800MiB"):
        size_in_bytes("memory", text)


# --- the command line --------------------------------------------------------------------------------------------


@pytest.mark.full  # minutes: whole networks are traced
def test_the_command_says_what_it_needs_and_reads_nothing(published, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = resident()
    words = ["generate", "a fox", "-m", str(published), "--plan", "--dtype", "bf16", "--device", "cpu"]
    assert run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert resident() < before + 500 * 2**20  # libraries, and none of two gigabytes
    assert list(tmp_path.iterdir()) == []
    assert told["dtype"] == "bfloat16" and told["offload"] == "none" and told["fits"] is True
    stages = told["stages"]
    assert list(stages) == ["load", "text", "denoise", "decode"]
    assert told["peak"] == max(stage["peak"] for stage in stages.values())
    assert 2.1e9 < stages["denoise"]["weights"] < 2.4e9
    larger = [*words, "--size", "768", "--json"]
    assert run(larger) == 0
    assert (
        json.loads(capsys.readouterr().out)["stages"]["denoise"]["activations"]
        > stages["denoise"]["activations"]
    )

    assert run([*words, "--memory", f"{told['peak'] - 2**26}b"]) == 0
    out = capsys.readouterr().out
    assert "--offload model" in " ".join(out.split()) and "denoise" in out
    assert run([*words, "--memory", "300MB"]) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1 and "--memory allows" in err and "286 MiB" in err


def test_a_model_of_our_own_tells_no_plan(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["--plan"], ["--memory", "6GB"], ["--offload", "model"]):
        assert run(["generate", "a cube", *words]) == 2
        assert "checkpoints" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize(
    "kept", [*(["--offload", level] for level in OFFLOADS), ["--memory", "1500MB"]], ids=" ".join
)
def test_a_drawing_takes_what_was_planned(published, tmp_path, kept):
    """The published size in a process of its own, within 10 %."""
    code = "import sys; from sfumato.cli.app import run; sys.exit(run(sys.argv[1:]))"
    words = ["generate", "a fox", "-m", str(published), "--size", "256", "--steps", "1", "--dtype", "bf16"]
    words += ["--device", "cpu", *kept, "--json", "-o", str(tmp_path / "out.png")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout)["memory"]
    assert memory["planned"] == pytest.approx(memory["peak"], rel=0.1)
    assert "--memory" not in kept or memory["peak"] <= 1.5e9
