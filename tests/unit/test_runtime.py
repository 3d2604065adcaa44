"""What is measured of the machine is true of it."""

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

import sfumato
from sfumato.errors import InputError
from sfumato.generate import Model, drawing_dtype
from sfumato.runtime import batch_invariant, bfloat16_is_fast, fast_dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_products_do_not_depend_on_the_batch_a_layer_does_not_either(dtype):
    if not batch_invariant(dtype):
        pytest.skip(f"{dtype} products depend on the batch here")
    torch.manual_seed(3)
    layer = torch.nn.Sequential(torch.nn.Linear(256, 1408), torch.nn.SiLU(), torch.nn.Linear(1408, 256)).to(
        dtype
    )
    rows = torch.randn(800, 256, dtype=dtype)
    with torch.inference_mode():
        whole = layer(rows)
        for few in (50, 333):
            assert torch.equal(layer(rows[:few]), whole[:few])


def test_drawing_in_the_fast_type_keeps_seeds_exact():
    device = torch.device("cpu")
    if drawing_dtype(device) == torch.float32:
        pytest.skip("pictures are drawn in float32 here")
    assert drawing_dtype(device) == fast_dtype(device)
    packaged = sfumato.load("pocket", "cpu")
    model = Model(packaged.system, device)
    several = model.generate(sfumato.Request("two red cubes", count=5, seed=10, steps=3))
    alone = model.generate(sfumato.Request("two red cubes", seed=13, steps=3))
    assert np.array_equal(np.asarray(several.images[3]), np.asarray(alone.images[0]))


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def test_bfloat16_is_taken_for_fast_where_products_in_it_take_less_time():
    took = {}
    for dtype in (torch.float32, torch.bfloat16):
        factor = torch.ones(512, 512, dtype=dtype)
        took[dtype] = min(seconds(lambda factor=factor: factor @ factor) for _ in range(10))
    ratio = took[torch.float32] / took[torch.bfloat16]
    if not 0.7 < ratio < 1.4:  # where it is even, either is right
        assert bfloat16_is_fast() == (ratio > 1)
    assert fast_dtype(torch.device("cpu")) == (torch.bfloat16 if bfloat16_is_fast() else torch.float32)


@pytest.mark.parametrize("name", ["dtype", "text_dtype"])
def test_a_types_name_is_no_type(name):
    with pytest.raises(InputError, match=f"^{name} must be a torch.dtype"):
        sfumato.load("pocket", "cpu", **{name: "float32"})
