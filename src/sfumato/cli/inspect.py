"""`sfumato inspect`: what a file or folder of weights is, from its headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli import show

if TYPE_CHECKING:
    from sfumato.checkpoint.header import Header, TensorInfo
    from sfumato.families.lora import Described

EXAMPLE = "sfumato inspect sd_xl_base_1.0.safetensors --json"
LINES, LETTERS = 20, 100  # of parts and metadata shown without --json: trainers note whole tables of captions


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A .safetensors file or a model folder.")],
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which of a folder's files, such as fp16.")
    ] = None,
    with_hash: Annotated[
        bool, typer.Option("--hash", help="Also SHA-256, which reads the files whole.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")] = False,
) -> None:
    """Say what a checkpoint is: family, parts, parameters, precision, hash, metadata. Headers are read, and 64 KiB."""
    from sfumato.storage import short_hash

    report, files = _folder(path, variant) if path.is_dir() else _file(path)
    if path.is_file() and (known := short_hash(path)):
        report["autov1"] = known
    if with_hash:
        report["sha256"] = _hashes(files)
    if as_json:
        show.answer({"path": str(path), **report})
    else:
        _print(path, report)


def _file(path: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """The report on a single file, whose parts are the family's, or else what its names begin with; and the file."""
    from sfumato.checkpoint.header import read_header
    from sfumato.families.describe import describe
    from sfumato.families.lora import describe as describe_lora

    header = read_header(path)
    if (lora := describe_lora(_shapes(header), header.metadata)) is not None:
        return _adapter(lora, header), {path.name: path}
    found = describe(_shapes(header), str(path))
    parts: dict[str, list[TensorInfo]] = {}
    for name, entry in header.tensors.items():
        own = next((part for part, prefix in found.parts.items() if name.startswith(prefix)), None)
        parts.setdefault(own or (name.partition(".")[0] if not found.parts else "other"), []).append(entry)
    report = {
        "family": found.kind,
        "layout": found.layout,
        "why": found.why,
        "traits": dict(found.traits),
        "bytes": header.size,
        "parts": {part: _counted(entries) for part, entries in parts.items()},
        "metadata": header.metadata,
    }
    return {key: value for key, value in report.items() if value or key in ("parts", "metadata")}, {
        path.name: path
    }


def _adapter(found: Described, header: Header) -> dict[str, Any]:
    """The report on a LoRA: whose it is, in which form, of which ranks; alpha as far as the header notes it."""
    parts = {part: {"modules": count} for part, count in found.parts.items()}
    ranks = {str(rank): count for rank, count in found.ranks.items()}
    report = {
        "family": found.family or "unknown",
        "adapter": "LoRA",
        "layout": ", ".join(found.formats),
        "why": found.why,
        "ranks": ranks,
        "alpha": found.alpha,
        "unknown": list(found.unknown),
        "bytes": header.size,
        "parts": parts,
        "metadata": header.metadata,
    }
    return {key: value for key, value in report.items() if value or key in ("parts", "metadata")}


def _folder(folder: Path, variant: str | None) -> tuple[dict[str, Any], dict[str, Path]]:
    """The report on a model folder, ours or in the layout of diffusers; and its files by their names in it."""
    from sfumato.checkpoint.header import read_header
    from sfumato.families import CARD
    from sfumato.families.describe import describe, kinds

    own = any((place / CARD).is_file() for place in (folder, folder / "model"))
    report, weights = _own_folder(folder) if own else _diffusers_folder(folder, variant)
    report |= {"bytes": 0, "parts": {}}
    for part, paths in weights.items():
        headers = [read_header(path) for path in paths]
        counted = _counted(entry for header in headers for entry in header.tensors.values())
        if not own:
            shapes = {name: shape for header in headers for name, shape in _shapes(header).items()}
            found = describe(shapes, str(paths[0].parent))
            counted["kind"] = found.kind
            if found.kind in kinds() or len(weights) == 1:
                report |= {"family": found.kind} | ({"why": found.why} if found.why else {})
        report["parts"][part] = counted
        report["bytes"] += sum(header.size for header in headers)
    return report, {path.relative_to(folder).as_posix(): path for paths in weights.values() for path in paths}


def _own_folder(folder: Path) -> tuple[dict[str, Any], dict[str, list[Path]]]:
    """Family and files of each part, as the card has them."""
    from sfumato.families import CARD, model_folder
    from sfumato.storage import read_json, shard_path

    place = model_folder(folder)
    card = read_json(place / CARD)
    listed = card.get("files")
    weights = {
        str(part): [shard_path(place, name) for name in names]
        for part, names in (listed.items() if isinstance(listed, dict) else ())
        if isinstance(names, list)
    }
    return {"family": str(card.get("family"))}, weights


def _diffusers_folder(folder: Path, variant: str | None) -> tuple[dict[str, Any], dict[str, list[Path]]]:
    """Pipeline, and the files of each part that has weights or must have them."""
    from sfumato.checkpoint.layout import STEMS, find_parts, weight_files
    from sfumato.families.describe import UNKNOWN

    layout = find_parts(folder)
    report: dict[str, Any] = {"family": UNKNOWN, "pipeline": layout.kind}
    if layout.absent:
        report["absent"] = list(layout.absent)
    weights = {
        part.name: list(weight_files(part.folder, part.stem or STEMS[0], variant).paths)
        for part in layout.parts.values()
        if part.stem is not None or part.network
    }
    return report, weights


def _shapes(header: Header) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in header.tensors.items()}


def _counted(entries: Iterable[TensorInfo]) -> dict[str, Any]:
    """Tensors and their numbers, in all and of each type."""
    tensors, numbers = 0, Counter[str]()
    for entry in entries:
        tensors += 1
        numbers[entry.dtype] += entry.count
    return {"tensors": tensors, "parameters": numbers.total(), "dtypes": dict(numbers)}


def _hashes(files: dict[str, Path]) -> dict[str, str]:
    """Name to SHA-256."""
    from sfumato.storage import file_hash

    hashes = {}
    with show.progress() as bar:
        task = bar.add_task("bytes", total=sum(path.stat().st_size for path in files.values()))
        for name, path in files.items():
            hashes[name] = file_hash(path, told=lambda count: bar.advance(task, count))
    return hashes


def _print(path: Path, report: dict[str, Any]) -> None:
    from sfumato.checkpoint.header import shown

    names = f" ({report['layout']} names)" if report.get("layout") else ""
    traits = "".join(f", {shown(str(key))} {value}" for key, value in report.get("traits", {}).items())
    rows = [("path", shown(str(path))), ("family", report["family"] + names + traits)]
    rows += [(key, report[key]) for key in ("adapter", "why", "alpha", "pipeline") if key in report]
    if ranks := report.get("ranks"):
        rows += [("ranks", ", ".join(f"{rank} ({count} modules)" for rank, count in ranks.items()))]
    if strange := report.get("unknown"):
        rows += [("unknown", f"{len(strange)} tensors, such as {shown(strange[0])}")]
    rows += [("absent", ", ".join(report["absent"]))] if "absent" in report else []
    rows += [("bytes", f"{report['bytes']:,}")]
    rows += [("hash", f"{report['autov1']} (AutoV1)")] if "autov1" in report else []
    rows += [("sha256", f"{digest}  {shown(name)}") for name, digest in report.get("sha256", {}).items()]
    for label, text in rows:
        show.line(f"{label:<10}{text}")
    parts, metadata = report["parts"], report.get("metadata", {})
    width = max((len(shown(part)) for part in list(parts)[:LINES]), default=0)
    for part, counted in list(parts.items())[:LINES]:
        if "modules" in counted:
            show.line(f"{'part':<10}{shown(part):<{width}}  {counted['modules']:,} modules")
            continue
        kind = f"  {counted['kind']}" if "kind" in counted else ""
        show.line(
            f"{'part':<10}{shown(part):<{width}}  {counted['parameters']:>14,} parameters in {counted['tensors']:,} "
            f"tensors of {', '.join(counted['dtypes'])}{kind}"
        )
    for key, text in list(metadata.items())[:LINES]:
        cut = shown(text[:LETTERS]) + ("…" if len(text) > LETTERS else "")
        show.line(f"{'metadata':<10}{shown(key)}: {cut}")
    for label, things in (("part", parts), ("metadata", metadata)):
        if len(things) > LINES:
            show.line(f"{label:<10}and {len(things) - LINES:,} more, which --json shows")
