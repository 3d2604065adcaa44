"""`agrees`: two answers are near enough, and how near goes into the record from which docs/parity.md is made.

And the references that several files compare with: transformers' CLIP and its tokenizers, diffusers' prompt reading.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clip_reference import KINDS, opened
from helpers import relative_error
from sfumato.families.sd.condition import PLANS, TextStack
from sfumato.text.clip import ClipConfig
from sfumato.text.clip_tokens import MERGES
from sfumato.text.windows import LENGTH


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Callable[[dict], None]:
    """Adds a line of JSON to the file named by --parity, and does nothing without it."""
    named = request.config.getoption("--parity")

    def add(values: dict) -> None:
        if named:
            with Path(named).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values) + "\n")

    return add


@pytest.fixture
def agrees(request: pytest.FixtureRequest, record: Callable[[dict], None]) -> Callable[..., None]:
    """agrees(what, configuration, ours, theirs, bound, reference): ‖ours − theirs‖ / ‖theirs‖ ≤ bound, and noted down.

    what: the network, pipeline or sampler. reference: package and name of what it is compared with. A bound of 0 is
    equality.
    """
    node: str = request.node.nodeid
    full = request.node.get_closest_marker("full") is not None

    def agree(
        what: str, configuration: str, ours: Tensor, theirs: Tensor, bound: float, reference: str
    ) -> None:
        error = relative_error(ours, theirs)
        assert error <= bound, f"{what}, {configuration}: {error:.2e} apart, at most {bound:.0e} is allowed"
        record(
            {
                "test": node.partition("[")[0],
                "case": node,
                "what": what,
                "configuration": configuration,
                "reference": reference,
                "error": error,
                "bound": bound,
                "full": full,
            }
        )

    return agree


@pytest.fixture(scope="module")
def theirs():
    """config → transformers' encoder of random weights, whose norms and biases matter too."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    made = {}

    def make(config: ClipConfig):
        if config not in made:
            torch.manual_seed(len(made))
            made[config] = (CLIPTextModelWithProjection if config.projection else CLIPTextModel)(
                CLIPTextConfig(
                    hidden_size=config.width,
                    num_hidden_layers=config.layers,
                    num_attention_heads=config.heads,
                    intermediate_size=config.inner or 4 * config.width,
                    hidden_act=config.activation,
                    projection_dim=config.projection or 32,
                    vocab_size=config.vocabulary,
                )
            ).eval()
            for name, weight in made[config].named_parameters():
                if not name.endswith("embedding.weight"):
                    weight.data.normal_(std=0.2 if weight.ndim > 1 else 0.1).add_("norm.weight" in name)
        return made[config]

    return make


@pytest.fixture(scope="module")
def ours(theirs):
    return lambda config: opened(config, theirs(config).state_dict())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer's folder as published ones have it. The ids are worked out here from the merges' file."""
    merges = MERGES.read_text(encoding="utf-8").split("\n")[1:-1]
    printable = [chr(b) for r in (range(33, 127), range(161, 173), range(174, 256)) for b in r]
    letters = printable + [chr(256 + n) for n in range(256 - len(printable))]
    pieces = [*letters, *(c + "</w>" for c in letters), *(m.replace(" ", "") for m in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    place = tmp_path_factory.mktemp("tokenizer")
    (place / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}), encoding="utf-8")
    (place / "merges.txt").write_text(MERGES.read_text(encoding="utf-8"), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def tokenizers(folder):
    """transformers' tokenizers that pad with the end mark, and with id 0."""
    from transformers import CLIPTokenizer

    return {
        pad: CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH, pad_token=mark)
        for pad, mark in ((None, "<|endoftext|>"), (0, "!"))
    }


def pipeline(kind: str, encoders, tokenizers):
    """diffusers' pipeline with nothing but what reads text."""
    import diffusers

    noise = diffusers.DDIMScheduler()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind in ("sd1", "sd2"):
            return diffusers.StableDiffusionPipeline(
                vae=None, text_encoder=encoders[0], tokenizer=tokenizers[0], unet=None, scheduler=noise,
                safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            )  # fmt: skip
        first = (None, None) if len(encoders) == 1 else (encoders[0], tokenizers[0])
        return diffusers.StableDiffusionXLPipeline(
            vae=None, text_encoder=first[0], text_encoder_2=encoders[-1], tokenizer=first[1],
            tokenizer_2=tokenizers[-1], unet=None, scheduler=noise, force_zeros_for_empty_prompt=kind == "sdxl",
            add_watermarker=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def stacks(ours):
    return lambda kind: TextStack(PLANS[kind], tuple(ours(config) for config in KINDS[kind]))


@pytest.fixture(scope="module")
def pipelines(theirs, tokenizers):
    return lambda kind: pipeline(
        kind, [theirs(c) for c in KINDS[kind]], [tokenizers[reader.pad] for reader in PLANS[kind].readers]
    )
