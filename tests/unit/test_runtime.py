"""What is measured of the machine is true of it."""

import numpy as np
import pytest
import torch

import sfumato
from sfumato.generate import Model, drawing_dtype
from sfumato.runtime import batch_invariant, fast_dtype


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
