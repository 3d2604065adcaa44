"""How far a budget of FLOPs goes: steps of autoencoder and denoiser, counted from the networks themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato.autoencoder import Autoencoder
from sfumato.data.buckets import Size
from sfumato.data.scenes import SceneSource
from sfumato.errors import InputError
from sfumato.families import family_named
from sfumato.flops import count_flops
from sfumato.study.recipe import Arm, StudyRecipe
from sfumato.text import Tokenizer
from sfumato.train.autoencoder import step_flops
from sfumato.train.denoiser import Examples, picture_flops
from sfumato.train.job import source_of
from sfumato.train.optim import make_optimizers
from sfumato.train.recipe import Recipe
from sfumato.train.stages import LATENT_STATISTICS_PICTURES, vocabulary

COUNTED_STEPS = 8  # steps whose prompts' lengths a picture's FLOPs are averaged over


@dataclass(frozen=True)
class Plan:
    """One arm and seed within its budget. All amounts in FLOPs.

    recipe: with the autoencoder's steps, and the denoiser's at the last point. steps: of the denoiser at each point.
    compute: spent at each point. autoencoder: its training; encoding: of the pictures, to statistics and latents;
    picture: a denoiser's training on one; drawn: one picture drawn, network and decoder.
    """

    arm: Arm
    seed: int
    recipe: Recipe
    steps: tuple[int, ...]
    compute: tuple[float, ...]
    autoencoder: float
    encoding: float
    picture: float
    drawn: float
    numbers: int  # of a latent
    tokens: int  # of a latent
    parameters: tuple[int, int]  # of autoencoder and denoiser


class Blank:
    """Latents of zeros, as far as FLOPs are concerned as good as any."""

    def __init__(self, source: SceneSource, shape: tuple[int, ...]):
        self.source, self.shape = source, shape

    def buckets(self) -> dict[Size, list[int]]:
        return self.source.buckets()

    def batch(self, indices: Sequence[int]) -> Tensor:
        return torch.zeros(len(indices), *self.shape)


def plan(study: StudyRecipe, arm: Arm, seed: int, words: tuple[str, ...]) -> Plan:
    """Count what arm and seed ask for, and deal out the budget. words: as `words_of` gives them.

    `InputError` when the budget does not reach to a first step of either network.
    """
    recipe = study.recipe(arm, seed)
    first, own = recipe.autoencoder, recipe.denoiser
    assert first is not None and own is not None
    size, count = recipe.data.size, recipe.data.count
    steps, training, encoding = 0, 0.0, 0.0
    with torch.device("meta"):
        shell = Autoencoder(first.model)
        shape = shell.latent_shape(1, size, size)
    if not arm.pixels:
        once = _counted(shell, size)
        encoding = once * (count + min(LATENT_STATISTICS_PICTURES, count))
        size_of_part = first.train.batch // first.train.parts
        per_step = first.train.batch * step_flops(first.model, first.loss, (size_of_part, size, size))
        steps = int(study.autoencoder * study.budget // per_step)
        training = steps * per_step
        if not steps:
            raise InputError(
                f"the budget of {arm.name} is below one step of its autoencoder: raise study.budget"
            )
    recipe = replace(recipe, autoencoder=replace(first, train=replace(first.train, steps=steps)))
    picture, update, drawn, parameters = _denoiser(recipe, shape, words, study)
    drawn += 0.0 if arm.pixels else _decoded(shell, shape)
    a_step = own.train.batch * picture + update
    reached = [int((share * study.budget - training - encoding) // a_step) for share in study.points]
    if reached[-1] < 1:
        raise InputError(
            f"the budget of {arm.name} is spent before its denoiser's first step: raise study.budget, or make "
            "study.autoencoder or data.count smaller"
        )
    kept = [n for n in reached if n > 0]
    return Plan(
        arm,
        seed,
        with_steps(recipe, kept[-1]),
        tuple(kept),
        tuple(training + encoding + n * a_step for n in kept),
        training,
        encoding,
        picture,
        drawn,
        numbers=shape[0] * shape[2] * shape[3],
        tokens=shape[2] * shape[3] // own.model.patch**2,
        parameters=(sum(p.numel() for p in shell.parameters()), parameters),
    )


def words_of(study: StudyRecipe) -> tuple[str, ...]:
    """The words that every arm's captions are read with: they are the same captions."""
    recipe = study.recipe(study.arms[0], study.seeds[0])
    assert recipe.denoiser is not None
    return vocabulary(_scenes(recipe), recipe.denoiser.vocabulary)


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with so many steps of its denoiser."""
    own = recipe.denoiser
    assert own is not None
    return replace(recipe, denoiser=replace(own, train=replace(own.train, steps=steps)))


def _scenes(recipe: Recipe) -> SceneSource:
    source = source_of(recipe, 1)
    assert isinstance(source, SceneSource)
    return source


def _counted(shell: Autoencoder, size: int) -> float:
    with torch.no_grad():
        return float(count_flops(shell.encode, torch.empty(1, 3, 1, size, size, device="meta")))


def _decoded(shell: Autoencoder, shape: tuple[int, ...]) -> float:
    with torch.no_grad():
        return float(count_flops(shell.decode, torch.empty(1, *shape, device="meta")))


def _denoiser(
    recipe: Recipe, shape: tuple[int, ...], words: tuple[str, ...], study: StudyRecipe
) -> tuple[float, float, float, int]:
    """FLOPs of one picture's training, of one update of the weights, and of a picture's drawing; parameters."""
    own, first = recipe.denoiser, recipe.autoencoder
    assert own is not None and first is not None
    family = family_named(recipe.family)
    system = family.build(family.configure(first.model, own.model, words, recipe.preset))
    network, source = system.denoiser, _scenes(recipe)
    examples = Examples(
        source,
        Blank(source, shape),  # type: ignore[arg-type]  # which has what is asked of a cache
        Tokenizer(words, own.model.max_tokens),
        own,
        recipe.seed,
        torch.device("cpu"),
    )
    known: dict[int, float] = {}  # by the length of the prompts, which alone changes the count
    lengths = []
    for step in range(1, COUNTED_STEPS + 1):
        for part in range(own.train.parts):
            batch = examples.part(step, part)
            lengths.append(batch.ids.shape[1])
            if lengths[-1] not in known:
                known[lengths[-1]] = picture_flops(network, batch, system.parameterization, own.loss)
    picture = sum(known[n] for n in lengths) / len(lengths)
    for weight in network.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizers = make_optimizers(network, own.train)
    update = float(count_flops(lambda: [optimizer.step() for optimizer in optimizers]))
    calls = (study.steps or recipe.preset.steps) * (2 if recipe.preset.guidance != 1 else 1)
    one = examples.part(1, own.train.parts // 2).first()
    with torch.no_grad():
        forward = count_flops(network, one.latents, torch.zeros(1), one.ids, one.mask)
    return picture, update, float(calls * forward), sum(p.numel() for p in network.parameters())
