"""`sfumato cost`: what pictures and clips cost, told before they are drawn; a machine measured; latents and pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli import options, parse, show
from sfumato.errors import InputError

if TYPE_CHECKING:
    from sfumato.generate import Model
    from sfumato.receipts.machine import Machine
    from sfumato.types import Request

EXAMPLE = "sfumato cost -m sd15.safetensors --size 512x768 --count 4 --per-hour 0.40"
MONEY = "What it costs"


def cost(
    prompt: Annotated[
        str | None, typer.Argument(help="What would be drawn; a usual prompt by default.")
    ] = None,
    model: options.Model = None,
    steps: options.Steps = None,
    size: options.Size = None,
    count: options.Count = "1",
    guidance: options.Guidance = None,
    sampler: options.Sampler = None,
    hires: options.Hires = None,
    frames: Annotated[
        str | None, typer.Option(metavar="N", help="Of a clip of so many frames, for models that draw clips.")
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the model on this machine, and keep the times.")
    ] = False,
    pixels: Annotated[
        bool,
        typer.Option("--pixels", help="Measure one picture, and one of the model's twin in pixel space."),
    ] = False,
    per_hour: Annotated[
        str | None, typer.Option(metavar="X", rich_help_panel=MONEY, help="Price of an hour of this machine.")
    ] = None,
    per_megapixel_step: Annotated[
        str | None,
        typer.Option(metavar="X", rich_help_panel=MONEY, help="Price of a step over a million pixels."),
    ] = None,
    currency: Annotated[
        str | None, typer.Option(metavar="NAME", rich_help_panel=MONEY, help="Of the prices: USD by default.")
    ] = None,
    watts: Annotated[
        str | None,
        typer.Option(metavar="W", rich_help_panel=MONEY, help="What the machine draws, if it does not tell."),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", rich_help_panel=MONEY, help="Keep these prices for this machine.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Say what pictures or clips will cost: FLOPs, seconds, memory, energy and money, by stage. Nothing is drawn."""
    from sfumato.receipts.machine import read_machine, with_price, write_machine
    from sfumato.types import Request

    request = Request(
        prompt or "",
        count=parse.whole("count", count),
        steps=None if steps is None else parse.whole("steps", steps),
        size=None if size is None else parse.size(size),
        guidance=None if guidance is None else parse.number("guidance", guidance),
        sampler=sampler,
    ).validate()
    if hires is not None:
        from dataclasses import replace

        from sfumato.parts import HiRes

        request = replace(request, hires=HiRes(parse.number("hires", hires))).validate()
    given = {"per_hour": per_hour, "per_megapixel_step": per_megapixel_step, "watts": watts}
    prices = {
        name: parse.number(name.replace("_", "-"), text) for name, text in given.items() if text is not None
    }
    machine = with_price(read_machine(), **prices, currency=currency)
    if keep:
        if not prices and currency is None:
            raise InputError(
                "keep keeps prices; give one by --per-hour, --per-megapixel-step, --watts or --currency",
                argument="keep",
            )
        write_machine(machine)
    from sfumato.generate import DEFAULT_MODEL, load

    opened = load(
        DEFAULT_MODEL if model is None else model,
        device=device,
        dtype=None if dtype is None else parse.dtype(dtype, parse.DRAWN),
        offload=None if calibrate or pixels else "auto",
    )
    if prompt is None:
        request = _usual(opened, request)
    request = _moving(opened, request, None if frames is None else parse.whole("frames", frames))
    if pixels:
        _check_pixels(request, calibrate)
        _show_pixels(opened, request, machine, as_json)
        return
    if calibrate:
        machine = _calibrated(opened, machine)
        write_machine(machine)
    _show_estimate(opened, request, machine, as_json)


def _check_pixels(request: Request, calibrate: bool) -> None:
    """`InputError` for what one picture, measured beside one of the twin, has none of."""
    refused = {
        "frames": (request.moves, "a twin in pixel space draws pictures; leave out --frames"),
        "count": (request.count > 1, "--pixels measures one picture of each model; leave out --count"),
        "hires": (request.hires is not None, "--pixels measures one pass of each model; leave out --hires"),
        "calibrate": (
            calibrate,
            "--pixels and --calibrate measure other things; ask for one after the other",
        ),
    }
    for argument, (asked, why) in refused.items():
        if asked:
            raise InputError(why, argument=argument)


def _usual(model: Model, request: Request) -> Request:
    """The request with a usual prompt, where the model reads one."""
    from dataclasses import replace

    from sfumato.receipts.bill import PROMPT

    return request if model.system.animates else replace(request, prompt=PROMPT)


def _moving(model: Model, request: Request, frames: int | None) -> Request:
    """The request as one for a clip, where frames are asked for or the model draws nothing else; it begins with a
    picture where the model sets one in motion."""
    from dataclasses import replace

    from PIL import Image

    from sfumato.drawing.clips import as_clip

    animates = model.system.animates
    if frames is None and not animates:
        return request
    if animates:
        request = replace(request, image=Image.new("RGB", request.size or model.preset["size"]))
    return as_clip(model, replace(request, frames=frames))


def _calibrated(model: Model, machine: Machine) -> Machine:
    from sfumato.receipts.bill import calibrate

    with show.progress() as bar:
        task = bar.add_task("measuring", total=None)
        return calibrate(model, machine, lambda text: bar.update(task, description=f"measuring {text}"))


def _show_estimate(model: Model, request: Request, machine: Machine, as_json: bool) -> None:
    from sfumato.planning import final_size
    from sfumato.receipts.bill import estimate
    from sfumato.tasks.canvas import by

    bill = estimate(model, request, machine)
    request = model.complete(request)
    if as_json:
        told = {
            "model": model.name,
            "prompt": request.prompt,
            "size": list(request.size or ()),
            "steps": request.steps,
        }
        told |= {"frames": request.frames} if request.moves else {}
        show.answer({**told, "dtype": str(model.dtype).removeprefix("torch."), **bill})
        return
    seconds = bill["seconds"] or {}
    rows = [[stage, _flops(flops), _seconds(seconds.get(stage))] for stage, flops in bill["flops"].items()]
    rows.append(["in all", _flops(sum(bill["flops"].values())), _seconds(bill["total_seconds"])])
    width, height = request.size or (0, 0)
    what = f"{request.count} of {f'{request.frames} frames of ' if request.moves else ''}{width}x{height}"
    if request.hires is not None:
        what += f" enlarged to {by(final_size(model, request))}"
    show.table(f"{model.name}: {what}, {request.steps} steps", ["", "FLOPs", "s"], rows)
    if bill["peak_bytes"]:
        show.line(f"memory: {_mebibytes(bill['peak_bytes'])} at most")
    if bill["joules"] is not None:
        show.line(f"energy: {bill['joules'] / 3600:.4g} Wh at {machine.price.watts:g} W")
    if bill["money"] is not None:
        show.line(f"money: {bill['money']:.4g} {bill['currency']}")
    for note in _notes(bill, machine):
        show.line(note)


def _notes(bill: dict[str, Any], machine: Machine) -> list[str]:
    """What the bill lacks, and how to get it."""
    notes = []
    if bill["basis"] is None:
        notes.append("seconds: not known; measure this model on this machine by --calibrate")
    elif bill["basis"] == "similar":
        notes.append("seconds: told from another model's times; measure this one by --calibrate")
    if bill["money"] is None and not (machine.price.per_hour or machine.price.per_megapixel_step):
        notes.append("money: give a price by --per-hour or --per-megapixel-step; --keep keeps it")
    return notes


def _show_pixels(model: Model, request: Request, machine: Machine, as_json: bool) -> None:
    from sfumato.receipts.cost import cost_report

    report = cost_report(model, request)
    columns = [report["latent"], report["pixel"]]
    steps = report["steps"] * report["size"][0] * report["size"][1] / 1e6
    for column in columns:
        column["money"] = machine.price.money(column["seconds"], steps)
    if as_json:
        show.answer(report)
        return
    rows = [
        ["numbers per picture", *(f"{c['numbers']:,}" for c in columns)],
        ["tokens", *(f"{c['tokens']:,}" for c in columns)],
        ["parameters", *(f"{c['parameters']:,}" for c in columns)],
        ["FLOPs: text", *(_flops(c["flops"]["text"]) for c in columns)],
        ["FLOPs: one step", *(_flops(c["flops"]["step"]) for c in columns)],
        ["FLOPs: decode", *(_flops(c["flops"]["decode"]) for c in columns)],
        ["FLOPs: picture", *(_flops(c["flops"]["picture"]) for c in columns)],
        ["seconds per picture", *(f"{c['seconds']:.3f}" for c in columns)],
        ["weights in memory", *(_mebibytes(c["weight_bytes"]) for c in columns)],
        ["other tensors, at most", *(_mebibytes(c["tensor_bytes"]) for c in columns)],
        ["process or GPU, at most", *(_mebibytes(c["peak_bytes"]) for c in columns)],
    ]
    if columns[0]["money"] is not None:
        rows.append([f"{machine.price.currency} per picture", *(f"{c['money']:.4g}" for c in columns)])
    width, height = report["size"]
    title = f"{report['model']}: one {width}x{height} picture, {report['steps']} steps, guidance {report['guidance']:g}"
    show.table(title, ["", "latent", "pixel twin"], rows)


def _seconds(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3g}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _flops(count: int) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return str(count)
