"""`sfumato encode`: a folder of pictures to the latents of a model's autoencoder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

import sfumato
from sfumato.cli import options, parse, show
from sfumato.cli.bulk import replicas_of

EXAMPLE = "sfumato encode photos -o latents -m sd_xl_base_1.0.safetensors --size 1024"
RECEIPT = "receipt.json"


def encode(
    folder: Annotated[Path, typer.Argument(help="A folder of pictures, or a WebDataset tar.")],
    output: Annotated[
        Path, Option("-o", "--output", metavar="DIR", help="Where the latents go: safetensors and an index.")
    ],
    model: options.Model = None,
    vae: options.Vae = None,
    size: Annotated[
        str, Option(metavar="N", help="Pixels: side of the square that has the area the pictures get.")
    ] = "512",
    ratio: Annotated[
        str, Option(metavar="X", help="Of the longest shape to the shortest; 1 makes everything square.")
    ] = "2",
    store: Annotated[str, Option(metavar="NAME", help="Stored as fp16, bf16 or fp32.")] = "fp16",
    batch: Annotated[str, Option(metavar="N", help="Pictures that are encoded together.")] = "8",
    shard: Annotated[str, Option(metavar="N", help="Pictures in one file, which a kill may cost.")] = "1024",
    dtype: options.Dtype = None,
    device: options.Device = None,
    ray: options.Ray = None,
    replicas: options.Replicas = "1",
    as_json: options.AsJson = False,
) -> None:
    """Encode pictures once. Started again, only what is new or has changed is encoded."""
    from sfumato.data.folder import FolderSource
    from sfumato.data.latents import build_latents, rows_in
    from sfumato.families.autoencoders import open_autoencoder
    from sfumato.generate import DEFAULT_MODEL
    from sfumato.runtime import drawing_dtype, pick_device
    from sfumato.storage import write_json

    started = time.perf_counter()
    rows, together = parse.whole("shard", shard), parse.between("batch", parse.whole("batch", batch), 1, 1024)
    stored = str(parse.dtype(store, name="store")).removeprefix("torch.")
    parse.folder("output", output)
    place = pick_device(device)
    opening: dict[str, Any] = {
        "model": DEFAULT_MODEL if model is None else model,
        "device": place,
        "dtype": drawing_dtype(place) if dtype is None else parse.dtype(dtype, parse.DRAWN),
        "vae": vae,
    }
    found = open_autoencoder(**opening)
    source = FolderSource(
        folder,
        parse.whole("size", size),
        multiple=found.factor,
        max_ratio=parse.number("ratio", ratio),
        captions=False,
    )
    for problem in source.problems:
        show.note(f"set aside: {problem}")
    write = None
    if ray is not None:
        from sfumato.cluster.bulk import encoding

        write = encoding(source, opening, ray, replicas_of(replicas))
    before = rows_in(output) if output.is_dir() else 0
    with show.progress() as bar:
        task = bar.add_task("encoding", total=len(source))

        def told(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        cache = build_latents(
            source,
            lambda pixels: found.encode(pixels.to(place)),
            found.digest,
            output,
            together,
            told,
            stored,
            parse.between("shard", rows, 1, 2**20),
            write,
        )
    added, seconds = rows_in(output) - before, round(time.perf_counter() - started, 3)
    receipt = {
        "sfumato": sfumato.__version__,
        "model": str(opening["model"]),
        "autoencoder": found.digest,
        "pictures": len(source),
        "encoded": added,
        "set_aside": len(source.problems),
        "sizes": {f"{width}x{height}": len(members) for (height, width), members in cache.buckets().items()},
        "stored": stored,
        "precision": str(found.dtype).removeprefix("torch."),
        "seconds": seconds,
    }
    write_json(output / RECEIPT, receipt)
    if as_json:
        show.answer({"folder": str(output), **receipt})
    else:
        show.line(
            f"{output}: {added} of {len(source)} pictures encoded in {seconds:.1f} s, the others were there"
        )
