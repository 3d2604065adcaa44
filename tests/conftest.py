"""Shared by all tests: the one oracle that cannot be imported as it is packaged, and an option of the parity tests."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sfumato import runtime
from sfumato.nn import products

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity", metavar="FILE", help="add what the parity tests measure to this file of JSON lines"
    )


def _open_k_diffusion() -> None:
    """Make `k_diffusion.sampling` and `k_diffusion.external` importable without the rest of the package.

    Its `__init__` imports CLIP, Inception, an experiment tracker and torchvision, which need gigabytes and builds that
    fit one torch alone. The samplers use a single helper of it, given here.
    """
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or "k_diffusion" in sys.modules or spec.submodule_search_locations is None:
        return
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    utils = types.ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]
    package.utils = utils
    sys.modules["k_diffusion"] = package
    sys.modules["k_diffusion.utils"] = utils


_open_k_diffusion()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """All work in the test's own thread, where modes that watch operations see it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _take_bfloat16_for(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for home in (runtime, products):
        monkeypatch.setattr(home, "bfloat16_is_fast", lambda: fast)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 goes the way of CPUs that are fast in it, whether or not this one is."""
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU has no products of bfloat16")
    _take_bfloat16_for(True, monkeypatch)


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 goes the way of CPUs that are slow in it."""
    _take_bfloat16_for(False, monkeypatch)


@pytest.fixture(params=["native", "widened"])
def either(request: pytest.FixtureRequest) -> str:
    """bfloat16 goes one way, and the other; which."""
    request.getfixturevalue(request.param)
    return request.param
