"""Windows to features: encode each on its own, weigh its tokens, join them (B, 77·k, D).

What a weight w does to the features z of its token:

    a1111          z·w, then the window is scaled so that its mean is what it was
    a1111_no_norm  z·w, A1111's "No norm"
    comfy          e + (z − e)·w, where e is the feature at that place in an empty prompt
    compel         as comfy; and for each stretch with w < 1 the window is blended with one in which no token may look
                   at it, in the proportion 1 : tan((1 − w)·π/2)
    none           nothing

Sources: AUTOMATIC1111 modules/sd_emphasis.py; ComfyUI comfy/sd1_clip.py; compel src/compel/embeddings_provider.py
(`DownweightMode.MASK`). A1111 takes the mean over all prompts of a batch, and compel normalises the blend over all
windows of a prompt; ours stay within a window, so that no prompt changes another. Pooled embeddings are not weighted,
in any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sfumato import checks
from sfumato.errors import InputError
from sfumato.text.clip import ClipTextEncoder
from sfumato.text.clip_tokens import ClipTokenizer
from sfumato.text.windows import Window, empty_window

WEIGHTINGS = ("a1111", "a1111_no_norm", "comfy", "compel", "none")
LEAST = 1e-5  # compel's floor for a weight, where tan is still finite
Hidden = Sequence[tuple[int, int]]  # for each row, from where to where no token may look
Encode = Callable[[Sequence[Window], Hidden], tuple[Tensor, Tensor | None]]


def encode_windows(
    encoder: ClipTextEncoder,
    tokenizer: ClipTokenizer,
    prompts: Sequence[Sequence[Window]],
    *,
    clip_skip: int = 1,
    final_norm: bool = True,
    weighting: str = "a1111",
) -> tuple[Tensor, Tensor | None]:
    """B prompts of k windows each → features (B, 77·k, D), and pooled (B, P) of each first window, or None.

    clip_skip and final_norm as in `ClipTextEncoder`. Windows that occur several times are encoded once. `InputError`
    for an unknown weighting, and for prompts of different numbers of windows (`windows.level` evens them).
    """

    def encode(rows: Sequence[Window], hidden: Hidden) -> tuple[Tensor, Tensor | None]:
        device = encoder.text_model.embeddings.token_embedding.weight.device
        placed = [
            (row, start, inversion.vectors)
            for row, window in enumerate(rows)
            for start, inversion in window.inversions
        ]
        ids, visible = ids_of(rows, device), visible_of(rows, hidden, device)
        return encoder(ids, placed, visible, clip_skip, final_norm)

    return encode_rows(encode, empty_window(tokenizer), prompts, weighting)


def encode_rows(
    encode: Encode, nothing: Window, prompts: Sequence[Sequence[Window]], weighting: str = "a1111"
) -> tuple[Tensor, Tensor | None]:
    """`encode_windows` with any encoder of windows of any one size N: features (B, N·k, D), and pooled.

    nothing: the window of an empty prompt.
    """
    weighting_named(weighting)
    if len({len(windows) for windows in prompts}) != 1:
        raise InputError("prompts encoded together must have one number of windows", argument="prompts")
    rows = list(dict.fromkeys(window for windows in prompts for window in windows))
    places = {window: place for place, window in enumerate(rows)}
    weighted = [] if weighting == "none" else [window for window in rows if window.weighted]

    # rows: the windows, then an empty one, then the windows without one of their weak stretches
    hidden = [(0, 0)] * len(rows)
    stretches: dict[Window, list[tuple[float, int]]] = {}  # weight of the stretch, row without it
    empty = len(rows)
    if weighted and weighting in ("comfy", "compel"):
        rows.append(nothing)
        hidden.append((0, 0))
    if weighting == "compel":
        for window in weighted:
            for start, stop in _weak(window.weights):
                stretches.setdefault(window, []).append((window.weights[start], len(rows)))
                rows.append(window)
                hidden.append((start, stop))

    z, pooled = encode(rows, hidden)
    out = z.clone()
    for window in weighted:
        place = places[window]
        weights = torch.tensor(window.weights, dtype=torch.float32, device=z.device)[:, None]
        if weighting.startswith("a1111"):
            out[place] = scaled(z[place], weights, keep_mean=weighting == "a1111")
            continue
        out[place] = from_empty(z[place], weights, z[empty])
        if window in stretches:
            parts = [(w, from_empty(z[row], weights, z[empty])) for w, row in stretches[window]]
            out[place] = blended(out[place], parts)
    index = torch.tensor([[places[window] for window in windows] for windows in prompts], device=z.device)
    features = out[index].flatten(1, 2)  # (B, k, N, D) → (B, N·k, D)
    return features, None if pooled is None else pooled[index[:, 0]]


def weighting_named(name: str) -> str:
    """The name itself; an unknown one is an `InputError` that lists the known ones."""
    if name not in WEIGHTINGS:
        raise InputError(
            f"weighting {checks.shown(name)} is unknown; known are {', '.join(WEIGHTINGS)}",
            argument="weighting",
        )
    return name


def scaled(z: Tensor, weights: Tensor, keep_mean: bool = True) -> Tensor:
    """z·w, and with keep_mean brought back to z's mean. z: (N, D); weights: (N, 1)."""
    weighed = z.float() * weights
    if keep_mean:
        weighed = weighed * (z.float().mean() / weighed.mean())
    return weighed.to(z.dtype)


def from_empty(z: Tensor, weights: Tensor, empty: Tensor) -> Tensor:
    """e + (z − e)·w; z itself where w is 1. z and empty: (N, D); weights: (N, 1)."""
    base = empty.float()
    return torch.where(weights == 1, z, (base + (z.float() - base) * weights).to(z.dtype))


def blended(z: Tensor, without: Sequence[tuple[float, Tensor]]) -> Tensor:
    """The mean of z and of features without a stretch, these in the proportion tan((1 − w)·π/2) to 1 of z."""
    shares = [math.tan((1 - max(LEAST, weight)) * math.pi / 2) for weight, _ in without]
    total = z.float()
    for share, (_, other) in zip(shares, without, strict=True):
        total = total + share * other.float()
    return (total / (1 + sum(shares))).to(z.dtype)


def ids_of(rows: Sequence[Window], device: torch.device) -> Tensor:
    """(R, N) int64."""
    return torch.tensor([window.ids for window in rows], device=device)


def visible_of(rows: Sequence[Window], hidden: Hidden, device: torch.device) -> Tensor | None:
    """(R, N) bool, False where no token may look; None where every one may everywhere."""
    if not any(stop for _, stop in hidden):
        return None
    visible = torch.ones(len(rows), len(rows[0].ids), dtype=torch.bool, device=device)
    for row, (start, stop) in zip(visible, hidden, strict=True):
        row[start:stop] = False
    return visible


def _weak(weights: Sequence[float]) -> list[tuple[int, int]]:
    """Start and stop of each stretch of one weight below 1."""
    stretches: list[tuple[int, int]] = []
    for place, weight in enumerate(weights):
        if weight >= 1:
            continue
        if stretches and stretches[-1][1] == place and weights[place - 1] == weight:
            stretches[-1] = (stretches[-1][0], place + 1)
        else:
            stretches.append((place, place + 1))
    return stretches
