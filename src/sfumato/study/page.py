"""A study's page: what was asked, what is complete, the numbers, and what they allow to be said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfumato.storage import atomic_file, write_json
from sfumato.study.plots import save
from sfumato.study.recipe import StudyRecipe
from sfumato.study.results import AGREE, TOLD, Cheaper, Results, cheaper, mean, orders, plain

FOLLOWS = 0.1  # of the strict score, from which on a model may be said to follow prompts
WORDS = {"strict": "strict score", "kernel_distance": "kernel distance"}


def write_page(results: Results, out: Path, path: Path, command: str) -> list[Path]:
    """Write the page as Markdown, its numbers beside it as JSON, its figures into `pictures/`; the page comes first."""
    pictures = save(results, out, path.parent / "pictures", path.stem)
    numbers = path.with_suffix(".json")
    write_json(numbers, {"study": results.study.name, "scenes": results.scenes, "runs": plain(results)})
    with atomic_file(path) as temporary:
        temporary.write_text(text(results, path.stem, [p.name for p in pictures], command), encoding="utf-8")
    return [path, numbers, *pictures]


def text(results: Results, stem: str, pictures: Sequence[str], command: str) -> str:
    """The page. pictures: the files that lie in `pictures/`."""
    parts = [
        "# What compression is worth",
        _question(results.study, command),
        _state(results),
        f"![Strict score and kernel distance against FLOPs of training](pictures/{stem}.png)",
        "A line goes through the means of an arm's seeds, each of which is a dot; pixels are dashed. A mark at the "
        "right edge is the arm's ceiling, what its autoencoder leaves of the scenes themselves; the grey line is "
        "the scenes.",
        _ends(results) + _level(results),
        _costs(results),
        "## What may be said",
        *_orders(results),
        _cheaper(results),
        *_drawn(stem, pictures),
        _limits(results),
    ]
    return "\n\n".join(parts) + "\n"


def _question(study: StudyRecipe, command: str) -> str:
    recipe = study.recipe(study.arms[0], study.seeds[0])
    assert recipe.denoiser is not None
    low, high = recipe.data.objects
    objects = f"{low} object" if low == high == 1 else f"{low} to {high} objects"
    trunk = recipe.denoiser.model
    return (
        f"The same denoiser, trained with the same number of FLOPs on the same {recipe.data.count:,} scenes of "
        f"{objects} at {recipe.data.size}×{recipe.data.size}: on pixels, and on latents of autoencoders of several "
        "factors. An autoencoder's training, and encoding the pictures with it, are paid from the same budget of "
        f"{study.budget:.2g} FLOPs; its training takes {study.autoencoder:.0%} of it. The trunk is {trunk.depth} "
        f"blocks {trunk.width} wide. A token stands for {study.token}×{study.token} pixels in every arm, or for one "
        "cell where that is more, so that up to that factor a step costs the same whatever the compression. In "
        "pixels `x` predicts the picture and `v` the velocity (both as in JiT, 2511.13720); all others predict the "
        f"velocity.\n\nEach point draws {study.pictures} captions of scenes that no training has seen, complete in "
        "all attributes. The strict score is the share of pictures in which the network detector finds exactly what "
        "was asked; the kernel distance compares the pictures with other unseen scenes in that detector's features. "
        f"The page is written by\n\n```sh\n{command}\n```"
    )


def _state(results: Results) -> str:
    study = results.study
    rows = []
    for arm in study.ranged:
        done = [str(curve.seed) for curve in results.of(arm)]
        begun = [str(c.seed) for c in results.curves if c.arm.name == arm.name and not c.complete]
        rows.append([f"`{arm.name}`", ", ".join(done) or "none", ", ".join(begun) or "–"])
    said = (
        "All arms and seeds are complete."
        if results.everything()
        else "**Not all of it is complete**; what follows is of what is."
    )
    machines = sorted(
        {f"{c.machine['device']}, {c.machine['threads']} thread(s)" for c in results.curves if c.machine}
    )
    on = f" Run on {'; '.join(machines)}." if machines else ""
    return f"{said}{on}\n\n" + _table(["arm", "seeds complete", "begun"], rows)


def _ends(results: Results) -> str:
    rows = []
    for arm in results.study.ranged:
        done = results.of(arm)
        if not done:
            continue
        ceilings = [c.ceiling for c in done if c.ceiling]
        rows.append(
            [
                f"`{arm.name}`",
                str(len(done)),
                _spread([100 * c.last("strict") for c in done], ".1f"),
                *(_spread([100 * c.last(name) for c in done], ".0f") for name in ("shape", "color")),
                _spread([c.last("kernel_distance") for c in done], ".2f"),
                f"{mean([c['psnr'] for c in ceilings]):.1f}" if ceilings else "exact",
                f"{100 * mean([c['strict'] for c in ceilings]):.1f}"
                if ceilings
                else _scene(results, "strict", 100),
                f"{mean([c['kernel_distance'] for c in ceilings]):.2f}"
                if ceilings
                else _scene(results, "kernel_distance", 1),
            ]
        )
    columns = [
        "arm",
        "seeds",
        "strict, %",
        "shape, %",
        "colour, %",
        "kernel distance",
        "reconstruction, dB",
        "ceiling strict, %",
        "ceiling distance",
    ]
    return (
        "## At the end of the budget\n\nMeans over seeds, the least and the most in brackets; beside them what the "
        "autoencoder alone leaves of the scenes.\n\n" + _table(columns, rows)
    )


def _level(results: Results) -> str:
    """What the strict scores say of the budget as a whole."""
    best = max((curve.last("strict") for curve in results.curves if curve.complete), default=None)
    if best is None or best >= FOLLOWS:
        return ""
    return (
        f"\n\n**The best strict score is {100 * best:.1f} %: within this budget no arm has learnt to follow its "
        "prompts.** What the curves show is the beginning of a training; only the kernel distance tells arms apart."
    )


def _scene(results: Results, name: str, scale: float) -> str:
    value = results.scenes.get(name)
    return "" if value is None else f"{scale * value:.{1 if scale > 1 else 2}f}"


def _costs(results: Results) -> str:
    rows = []
    for arm in results.study.ranged:
        for curve in [c for c in results.curves if c.arm.name == arm.name][:1]:
            p = curve.plan
            known = [s for s in (point["seconds"] for point in curve.points) if s is not None]
            whole = len(known) == len(curve.points) and curve.complete
            rows.append(
                [
                    f"`{arm.name}`",
                    f"{p['numbers']:,}",
                    str(p["tokens"]),
                    f"{p['parameters'][0] / 1e6:.2f} + {p['parameters'][1] / 1e6:.2f}",
                    f"{p['autoencoder_steps']:,}",
                    f"{p['steps'][-1]:,}",
                    f"{p['picture'] / 1e9:.2f}",
                    f"{p['drawn'] / 1e9:.2f}",
                    f"{sum(known):.0f}" if whole else "",
                ]
            )
    columns = [
        "arm",
        "numbers a picture",
        "tokens",
        "million weights, autoencoder + denoiser",
        "steps of autoencoder",
        "of denoiser",
        "GFLOP a picture trained on",
        "GFLOP a picture drawn",
        "seconds of training",
    ]
    return (
        "## Where the budget went\n\nCounted operation by operation (`sfumato/flops.py`), forward, backward and the "
        "optimiser's products; seconds are the processor's, of the first seed.\n\n" + _table(columns, rows)
    )


def _orders(results: Results) -> list[str]:
    enough = [arm for arm in results.study.arms if len(results.of(arm)) >= AGREE]
    if len(enough) < 2:
        return [
            f"An order of two arms is claimed only where each has {AGREE} complete seeds and every seed of the one "
            f"is better than every seed of the other. **{'No arm has' if not enough else 'One arm alone has'} so "
            "many: no order is claimed.**"
        ]
    parts = [
        f"An order of two arms is claimed only where each has {AGREE} complete seeds and every seed of the one is "
        f"better than every seed of the other, by strict scores from {TOLD:.0%} on. Pairs that are not listed are not "
        "told apart."
    ]
    for measure, word in WORDS.items():
        beaten: dict[str, list[str]] = {}
        for better, worse in orders(results, measure):
            beaten.setdefault(better.name, []).append(f"`{worse.name}`")
        lines = [f"- `{name}` is better than {', '.join(worse)}" for name, worse in beaten.items()]
        parts.append(f"By {word}:\n\n" + ("\n".join(lines) or "- none"))
    return parts


def _cheaper(results: Results) -> str:
    """How much cheaper latents are for the same quality."""
    rows, found = [], []
    for arm in results.study.ranged:
        if arm.pixels:
            continue
        cells = []
        for measure in WORDS:
            ratio = cheaper(results, arm, measure)
            cells += [_ratio(ratio), _ratio(cheaper(results, arm, measure, given=True))]
            if ratio:
                found.append(ratio)
        rows.append([f"`{arm.name}`", *cells])
    said = "## How much cheaper for the same quality\n\n"
    if not found:
        return (
            said
            + "Nothing to say yet: that takes a complete pixel arm and a complete latent arm of one seed."
        )
    against = sorted({f"`{r.pixel.name}` by {WORDS[r.measure]}" for r in found})
    headline = _headline([r for r in found if r.measure == "kernel_distance"])
    return (
        f"{said}Training FLOPs that the best pixel arm ({', '.join(against)}) takes to a quality, divided by those "
        "that the latent arm takes to the same, the autoencoder's included. The quality is the best that both reach "
        "within the budget, seed by seed; between points the curves are taken as straight over the logarithm of "
        "compute. Above 1 the latent is cheaper; in the columns beside, an autoencoder that is there already costs "
        "nothing. The median, and the range of the seeds; strict scores are compared from "
        f"{TOLD:.0%} on. ≤ and ≥: one of the two was as good at its first point already, and is charged all of it.\n\n"
        + _table(["arm", *(c for word in WORDS.values() for c in (f"by {word}", "autoencoder given"))], rows)
        + f"\n\n{headline}"
    )


def _headline(found: Sequence[Cheaper]) -> str:
    if not found:
        return ""
    best = max(found, key=lambda r: r.middle)
    seeds = len(best.ratios)
    sure = seeds >= AGREE and (min(best.ratios) > 1 or max(best.ratios) < 1)
    told = f"{best.middle:.1f} times cheaper" if best.middle >= 1 else f"{1 / best.middle:.1f} times dearer"
    found_out = f"`{best.latent.name}` is {told} than `{best.pixel.name}` at the same kernel distance ({_ratio(best)})"
    if sure:
        return f"**Of the latent arms, {found_out}; all {seeds} seeds agree which is cheaper.**"
    short = (
        "the seeds do not agree"
        if seeds >= AGREE
        else f"{seeds} of the {AGREE} seeds that it takes are there"
    )
    return f"**Not claimed, since {short}: of the latent arms, {found_out}.**"


def _ratio(ratio: Cheaper | None) -> str:
    if ratio is None:
        return "–"
    bound = {(True, False): "≤ ", (False, True): "≥ ", (True, True): "about "}.get(
        (ratio.at_most, ratio.at_least), ""
    )
    if len(ratio.ratios) == 1:
        return f"{bound}{ratio.middle:.2f}"
    return f"{bound}{ratio.middle:.2f} ({min(ratio.ratios):.2f}–{max(ratio.ratios):.2f})"


def _drawn(stem: str, pictures: Sequence[str]) -> list[str]:
    name = f"{stem}-drawn.png"
    if name not in pictures:
        return []
    return [
        "## What they drew",
        f"![Eight pictures of every arm](pictures/{name})\n\nThe same eight captions, drawn by every arm at the end "
        "of its budget (first complete seed).",
    ]


def _limits(results: Results) -> str:
    recipe = results.study.recipe(results.study.arms[0], results.study.seeds[0])
    token = results.study.token
    points = (
        "One world: rendered solids on a floor, with little fine detail. Photographs are another matter.",
        f"One budget and one size, {recipe.data.size}×{recipe.data.size}. An autoencoder is trained once for many "
        "denoisers and pays off over them; here each arm pays for its own.",
        f"Tokens of {token}×{token} pixels make a step on pixels as cheap as one on latents. That is kind to pixels: "
        f"with a token for each they would have {token**2} times as many.",
        "Equal training, not equal tuning: rates and losses are the recipe's, the same for all but where it says.",
        "Losses without a discriminator or pretrained features: reconstructions are soft.",
        "The detector was trained on renders, sharp and damaged, at 128×128; other sizes are resized for it.",
    )
    return "## What this does not show\n\n" + "\n".join(f"- {point}" for point in points)


def _spread(values: Sequence[float], form: str) -> str:
    if len(values) == 1:
        return format(values[0], form)
    return f"{mean(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
