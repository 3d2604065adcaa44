"""ΔW of every form by its formula in float64, and what forms that do not go together are told."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sfumato.adapters.delta import Decomposed, Difference, LowRank, change_of, folded, rows_of
from sfumato.adapters.lora import delta_of

O, I, R, K = 12, 8, 3, 3  # outputs, inputs, rank, side of a kernel


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def agree(found: Tensor, right: Tensor) -> None:
    assert found.dtype == torch.float32 and found.shape == right.shape
    assert torch.allclose(found.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("alpha", "stabilised", "scale"),
    [(None, False, 1.0), (1.5, False, 1.5 / R), (2.0, True, 2 / math.sqrt(R))],
)
def test_a_product_of_matrices(alpha, stabilised, scale):
    up, down = numbers(O, R), numbers(R, I)
    kernel, bias = delta_of({"up": up, "down": down}, alpha, stabilised)
    a, b = wide(up, down)
    assert bias is None and kernel.rank == R and kernel.shape == (O, I)
    agree(kernel.full((O, I)), scale * a @ b)
    assert kernel.norm() == pytest.approx(float((scale * a @ b).norm()), rel=1e-9)


def test_an_alpha_in_the_file_comes_before_any_other():
    found = {"up": numbers(O, R), "down": numbers(R, I), "alpha": torch.tensor(6.0)}
    assert delta_of(found, 1.0)[0].scale == 6 / R
    assert delta_of(found | {"scalar": torch.tensor(0.5)}, 1.0)[0].scale == 3 / R


def test_a_product_of_convolutions_acts_as_the_two_one_after_the_other():
    up, down, x = numbers(O, R, 1, 1), numbers(R, I, K, K), numbers(1, I, 9, 9)
    weight = delta_of({"up": up, "down": down})[0].full((O, I, K, K))
    right = functional.conv2d(functional.conv2d(x.double(), down.double(), padding=1), up.double())
    assert torch.allclose(functional.conv2d(x, weight, padding=1).double(), right, atol=1e-4)


def test_a_kernel_between_two_acts_as_the_three_one_after_the_other():
    up, mid, down, x = numbers(O, R, 1, 1), numbers(R, R, K, K), numbers(R, I, 1, 1), numbers(1, I, 9, 9)
    kernel = delta_of({"up": up, "down": down, "mid": mid})[0]
    assert kernel.shape == (O, I, K, K)
    h = functional.conv2d(functional.conv2d(x.double(), down.double()), mid.double(), padding=1)
    right = functional.conv2d(h, up.double())
    assert torch.allclose(
        functional.conv2d(x, kernel.full((O, I, K, K)), padding=1).double(), right, atol=1e-4
    )


def test_linear_layers_fit_kernels_of_one():
    up, down = numbers(O, R), numbers(R, I)
    agree(
        delta_of({"up": up, "down": down})[0].full((O, I, 1, 1)),
        (up.double() @ down.double())[..., None, None],
    )


def test_loha():
    a1, b1, a2, b2 = (
        numbers(*s, seed=n) for n, s in enumerate([(O, R), (R, I * K * K), (O, R), (R, I * K * K)])
    )
    found = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    kernel = delta_of(found, 1.0)[0]
    a1, b1, a2, b2 = wide(a1, b1, a2, b2)
    agree(kernel.full((O, I, K, K)), (((a1 @ b1) * (a2 @ b2)) / R).reshape(O, I, K, K))


def test_loha_with_cores():
    t1, t2 = numbers(R, R, K, K), numbers(R, R, K, K, seed=1)
    a1, a2, b1, b2 = numbers(R, O), numbers(R, O, seed=1), numbers(R, I), numbers(R, I, seed=1)
    found = {"hada_t1": t1, "hada_t2": t2, "hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    # lycoris/functional/loha.py
    one = torch.einsum("i j k l, j r, i p -> p r k l", *wide(t1, b1, a1))
    two = torch.einsum("i j k l, j r, i p -> p r k l", *wide(t2, b2, a2))
    agree(delta_of(found, 6.0)[0].full((O, I, K, K)), one * two * 2)


W1, W1_PARTS = {"lokr_w1": numbers(3, 2)}, {"lokr_w1_a": numbers(3, 2), "lokr_w1_b": numbers(2, 2)}


@pytest.mark.parametrize("first", [W1, W1_PARTS])
@pytest.mark.parametrize("second", ["whole", "parts", "kernel", "rows of a kernel", "core"])
def test_lokr_in_all_its_forms(first, second):
    """An 12×8 layer, or a kernel, of 3×2 and 4×4. The scale is alpha/rank, and 1 where both factors are whole."""
    forms = {
        "whole": {"lokr_w2": numbers(4, 4)},
        "parts": {"lokr_w2_a": numbers(4, 2), "lokr_w2_b": numbers(2, 4)},
        "kernel": {"lokr_w2": numbers(4, 4, K, K)},
        "rows of a kernel": {"lokr_w2_a": numbers(4, 2), "lokr_w2_b": numbers(2, 4 * K * K)},
        "core": {"lokr_t2": numbers(2, 2, K, K), "lokr_w2_a": numbers(2, 4), "lokr_w2_b": numbers(2, 4)},
    }
    found = first | forms[second]
    shape = (O, I) if second in ("whole", "parts") else (O, I, K, K)
    wide_found = {name: tensor.double() for name, tensor in found.items()}
    one = wide_found.get("lokr_w1")
    if one is None:
        one = wide_found["lokr_w1_a"] @ wide_found["lokr_w1_b"]
    two = wide_found.get("lokr_w2")
    if second == "core":
        two = torch.einsum(
            "i j k l, j r, i p -> p r k l", *(wide_found[n] for n in ("lokr_t2", "lokr_w2_b", "lokr_w2_a"))
        )
    elif two is None:
        two = wide_found["lokr_w2_a"] @ wide_found["lokr_w2_b"]
    if two.ndim == 4:
        one = one[:, :, None, None]
    scale = 1.0 if "lokr_w1" in found and "lokr_w2" in found else 5 / 2
    agree(
        delta_of(found, 5.0)[0].full(shape),
        (torch.kron(one.contiguous(), two.contiguous()) * scale).reshape(shape),
    )


def test_differences_of_weights_and_biases():
    kernel, bias = delta_of({"diff": numbers(O, I), "diff_b": numbers(O), "alpha": torch.tensor(0.1)})
    agree(kernel.full((O, I)), numbers(O, I).double())
    agree(bias.full((O,)), numbers(O).double())
    _, bias = delta_of({"up": numbers(O, R), "down": numbers(R, I), "up_bias": numbers(O)}, 6.0)
    agree(bias.full((O,)), 2 * numbers(O).double())


@pytest.mark.parametrize(
    ("shape", "magnitude", "axis"),
    [((O, I), (O, 1), 1), ((O, I), (O,), 1), ((O, I), (1, I), 0), ((O, I, K, K), (O, 1, 1, 1), (1, 2, 3)),
     ((O, I, K, K), (1, O, 1, 1), (1, 2, 3)), ((O, I, K, K), (1, I, 1, 1), (0, 2, 3))],
)  # fmt: skip
def test_dora_by_outputs_and_by_inputs(shape, magnitude, axis):
    """Eq. 5 of the paper, whose norms are of W + ΔW: LyCORIS writes both axes, PEFT outputs."""
    base, scale = numbers(*shape), numbers(*magnitude).abs()
    up, down = numbers(O, R, *[1] * (len(shape) - 2)), numbers(R, *shape[1:])
    delta = delta_of({"up": up, "down": down, "dora_scale": scale}, 6.0)[0]
    assert isinstance(delta, Decomposed)
    moved = base.double() + 2 * (up.double().flatten(1) @ down.double().flatten(1)).reshape(shape)
    wanted = scale.double().reshape(
        [-1 if d not in (axis if isinstance(axis, tuple) else (axis,)) else 1 for d in range(len(shape))]
    )
    right = wanted * moved / torch.linalg.vector_norm(moved, dim=axis, keepdim=True)
    agree(folded(base, [(1.0, delta)]), right)
    agree(folded(base, [(0.25, delta)]), 0.25 * right + 0.75 * base.double())


def test_dora_that_changes_nothing_gives_the_base_back():
    base = numbers(O, I)
    delta = Decomposed(Difference(torch.zeros(O, I)), base.norm(dim=1), outputs=True)
    assert torch.allclose(folded(base, [(1.0, delta)]), base, atol=1e-6)


def test_several_add_up_whatever_their_order():
    base = numbers(O, I).to(torch.bfloat16)
    first = (0.5, LowRank(numbers(O, R), numbers(R, I), 2.0))
    second = (-2.0, Difference(numbers(O, I)))
    right = base.double() + numbers(O, R).double() @ numbers(R, I).double() - 2 * numbers(O, I).double()
    agree(folded(base, [first, second]), right)
    agree(folded(base, [second, first]), right)
    assert base.dtype == torch.bfloat16 and torch.equal(base, numbers(O, I).to(torch.bfloat16))


def test_rows_of_a_fused_layer():
    inner = LowRank(numbers(3 * O, R), numbers(R, I))
    whole = inner.full((3 * O, I))
    for form in (inner, Difference(whole)):
        for place in range(3):
            part = rows_of(form, (place,), 3)
            assert part.shape == (O, I)
            assert torch.allclose(
                change_of(part, torch.zeros(O, I)), whole[place * O : (place + 1) * O], atol=1e-6
            )


def test_halves_in_the_other_order():
    inner = LowRank(numbers(2 * O, R), numbers(R, I))
    whole = inner.full((2 * O, I))
    wanted = torch.cat([whole[O:], whole[:O]])
    for form in (inner, Difference(whole)):
        assert torch.allclose(rows_of(form, (1, 0), 2).full((2 * O, I)), wanted, atol=1e-6)
    with pytest.raises(ValueError, match="rows do not fall into 5 equal parts"):
        rows_of(inner, (1,), 5)


@pytest.mark.parametrize("outputs", [True, False])
def test_dora_of_rows(outputs):
    """The norm is over a row, so rows can be told apart; over the inputs of all rows they cannot."""
    base, delta = numbers(3 * O, I), LowRank(numbers(3 * O, R), numbers(R, I))
    dora = Decomposed(delta, numbers(3 * O, 1) if outputs else numbers(1, I), outputs)
    whole = change_of(dora, base)
    order = torch.cat([whole[2 * O :], whole[:O], whole[O : 2 * O]])
    mixed = torch.cat([base[2 * O :], base[:O], base[O : 2 * O]])
    assert torch.allclose(change_of(rows_of(dora, (2, 0, 1), 3), mixed), order, atol=1e-5)
    if not outputs:
        with pytest.raises(ValueError, match="DoRA over the inputs of a layer that is 3 here"):
            rows_of(dora, (1,), 3)
        return
    assert torch.allclose(change_of(rows_of(dora, (1,), 3), base[O : 2 * O]), whole[O : 2 * O], atol=1e-5)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"up": numbers(O, R)}, "a LoRA without its down"),
        ({"down": numbers(R, I)}, "a LoRA without its up"),
        ({"up": numbers(O, R), "down": numbers(R + 1, I)}, "do not go together"),
        ({"up": numbers(O, R), "down": numbers(R, I), "alpha": numbers(2)}, "where one number is right"),
        ({"up": numbers(O, R), "down": numbers(R, I), "alpha": torch.tensor(math.nan)}, "alpha is nan"),
        ({"up": numbers(O, R), "down": numbers(R, I), "diff": numbers(O, I)}, "LoRA and a whole difference"),
        ({"up": numbers(O, R), "down": numbers(R, I), "mid": numbers(R, R)}, "does not go between"),
        ({"up": torch.zeros(O, 0), "down": torch.zeros(0, I)}, "rank 0"),
        ({"hada_w1_a": numbers(O, R), "hada_w1_b": numbers(R, I)}, "a LoHa without hada_w2_a"),
        ({"lokr_w1": numbers(3, 2), "lokr_w2_a": numbers(4, 2)}, "a LoKr without lokr_w2_b"),
        ({"lokr_w1": numbers(3, 2), "lokr_w1_a": numbers(3, 2), "lokr_w2": numbers(4, 4)}, "both whole and in parts"),
        ({"up": numbers(O, R), "down": numbers(R, I), "dora_scale": numbers(5, 1)}, "DoRA's magnitude (5, 1)"),
        ({"dora_scale": numbers(O, 1)}, "magnitude without a LoRA"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_told(found, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        delta_of(found)
