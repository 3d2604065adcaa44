"""`sfumato serve`: the HTTP API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from sfumato.cli import parse, show
from sfumato.cli.bulk import replicas_of
from sfumato.errors import InputError

EXAMPLE = "sfumato serve -m sd_xl_base_1.0.safetensors --host 0.0.0.0 --keys keys.json --prices prices.toml"
MODELS, MONEY, LIMITS = "What is served", "Who and for how much", "How much at once"


def serve(
    model: Annotated[
        list[str] | None,
        Option(
            "-m", "--model", metavar="[NAME=]MODEL", rich_help_panel=MODELS, help="A model; may be repeated."
        ),
    ] = None,
    models: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            rich_help_panel=MODELS,
            help="Models with all they need, as TOML (docs/serving.md).",
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        Option(
            metavar="NAME=FILE",
            rich_help_panel=MODELS,
            help="A LoRA that requests may ask for, of one model.",
        ),
    ] = None,
    controlnet: Annotated[
        list[str] | None,
        Option(metavar="NAME=FILE", rich_help_panel=MODELS, help="A ControlNet for requests, of one model."),
    ] = None,
    dtype: Annotated[
        str | None, Option(metavar="NAME", rich_help_panel=MODELS, help="Of one model's weights.")
    ] = None,
    device: Annotated[
        list[str] | None,
        Option(metavar="NAME", rich_help_panel=MODELS, help="cpu, cuda, cuda:1 …; a worker for each."),
    ] = None,
    ray: Annotated[
        str | None,
        Option(
            metavar="ADDRESS",
            rich_help_panel=MODELS,
            help="Draw on a Ray cluster: its address, or local (pip install 'sfumato\\[cluster]').",
        ),
    ] = None,
    replicas: Annotated[
        str, Option(metavar="N", rich_help_panel=MODELS, help="Of --ray: workers on each --device.")
    ] = "1",
    host: Annotated[str, Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[str, Option(metavar="N", help="0 takes any that is free.")] = "8000",
    name: Annotated[
        list[str] | None,
        Option(metavar="HOST", help="Another name that this server is called by; may be repeated."),
    ] = None,
    keys: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            rich_help_panel=MONEY,
            help="Keys (`sfumato keys`); without it, this machine alone.",
        ),
    ] = None,
    prices: Annotated[
        Path | None,
        Option(metavar="FILE", rich_help_panel=MONEY, help="Price rules; without them all is free."),
    ] = None,
    data: Annotated[
        Path | None,
        Option(metavar="DIR", help="Ledger and pictures; ~/.local/share/sfumato/serve by default."),
    ] = None,
    ledger: Annotated[
        str | None, Option(metavar="URL", help="Another ledger: postgresql+psycopg://user@host/name.")
    ] = None,
    queue: Annotated[str, Option(metavar="N", rich_help_panel=LIMITS, help="Jobs that may wait.")] = "64",
    batch: Annotated[
        str, Option(metavar="N", rich_help_panel=LIMITS, help="Pictures that a device works on together.")
    ] = "8",
    deadline: Annotated[
        str, Option(metavar="SECONDS", rich_help_panel=LIMITS, help="That a job has if it says nothing.")
    ] = "600",
    memory: Annotated[
        str | None,
        Option(metavar="SIZE", rich_help_panel=LIMITS, help="That a worker may take, such as 6GB."),
    ] = None,
    lora_size: Annotated[
        str,
        Option(
            metavar="SIZE",
            rich_help_panel=LIMITS,
            help="Of the largest LoRA that a client may send; 0B: none.",
        ),
    ] = "1GiB",
    drain: Annotated[
        str, Option(metavar="SECONDS", rich_help_panel=LIMITS, help="That a stop waits for accepted jobs.")
    ] = "120",
    grace: Annotated[
        str,
        Option(
            metavar="SECONDS",
            rich_help_panel=LIMITS,
            help="That a job goes on when an OpenAI client has hung up, which may try again.",
        ),
    ] = "10",
    keep: Annotated[
        str, Option(metavar="DAYS", rich_help_panel=LIMITS, help="That pictures are kept.")
    ] = "7",
) -> None:
    """Serve pictures over HTTP: a native API, OpenAI's and the web UI's. SIGTERM ends it when its jobs are done."""
    from sfumato.serve.money import Prices, read_prices
    from sfumato.serve.settings import (
        Settings,
        default_data,
        model_given,
        named_files,
        read_models,
        require_extra,
    )

    if model and models is not None:
        raise InputError("give models by -m, or by a file of them", argument="models")
    one: dict[str, Any] = {
        "dtype": dtype,
        "loras": named_files("lora", lora or []),
        "controlnets": named_files("controlnet", controlnet or []),
    }
    one = {field: value for field, value in one.items() if value}
    wanted = [] if models is not None else model or [_default()]
    if one and len(wanted) != 1:
        raise InputError(
            f"{next(iter(one))} is of one model; for several give --models FILE", argument=next(iter(one))
        )
    settings = Settings(
        models=read_models(models)
        if models is not None
        else tuple(model_given(text, **one) for text in wanted),
        data=data or default_data(),
        devices=tuple(device or [None]) * (1 if ray is None else replicas_of(replicas)),
        host=host,
        port=parse.whole("port", port),
        keys=keys,
        ledger=ledger or "",
        prices=Prices() if prices is None else read_prices(prices),
        queue=parse.whole("queue", queue),
        batch=parse.whole("batch", batch),
        deadline=parse.number("deadline", deadline),
        longest=max(3600.0, parse.number("deadline", deadline)),
        drain=parse.number("drain", drain),
        keep=86400 * parse.number("keep", keep),
        grace=parse.number("grace", grace),
        hosts=tuple(name or ()),
        lora_size=parse.size_in_bytes("lora-size", lora_size),
        memory=None if memory is None else parse.size_in_bytes("memory", memory),
    ).validate()
    require_extra()
    import logging

    from sfumato.serve.run import serve as run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    names = ", ".join(each.name for each in settings.models)

    def told(address: str) -> None:
        show.line(f"serving {names} at {address}")

    if ray is None:
        run(settings, told)
        return
    from sfumato.cluster.replicas import Replicas

    cluster = Replicas(ray, len(settings.devices))
    try:
        run(settings, told, cluster.connect)
    finally:
        cluster.close()


def _default() -> str:
    from sfumato.families import DEFAULT_MODEL

    return DEFAULT_MODEL
