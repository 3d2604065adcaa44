"""Verbs to functions, errors to one line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from sfumato.cli import (
    animate,
    chart,
    convert,
    cost,
    encode,
    evaluate,
    fields,
    generate,
    inspect,
    keys,
    lora,
    models,
    preflight,
    replay,
    scenes,
    serve,
    study,
    train,
    usage,
)
from sfumato.errors import Cancelled, InputError, SfumatoError
from sfumato.families import ALIASES
from sfumato.wording import worded

DEBUG_VARIABLE = "SFUMATO_DEBUG"  # set to anything to see the traceback of a failure
VERBS: dict[str, tuple[Callable[..., None], str]] = {
    "generate": (generate.generate, generate.EXAMPLE),
    "animate": (animate.animate, animate.EXAMPLE),
    "train": (train.train, train.EXAMPLE),
    "scenes": (scenes.scenes, scenes.EXAMPLE),
    "encode": (encode.encode, encode.EXAMPLE),
    "evaluate": (evaluate.evaluate, evaluate.EXAMPLE),
    "chart": (chart.chart, chart.EXAMPLE),
    "preflight": (preflight.preflight, preflight.EXAMPLE),
    "replay": (replay.replay, replay.EXAMPLE),
    "cost": (cost.cost, cost.EXAMPLE),
    "inspect": (inspect.inspect, inspect.EXAMPLE),
    "convert": (convert.convert, convert.EXAMPLE),
    "models": (models.models, models.EXAMPLE),
    "serve": (serve.serve, serve.EXAMPLE),
    "usage": (usage.usage, usage.EXAMPLE),
}

# verbs that have verbs of their own
GROUPS: dict[str, tuple[str, dict[str, tuple[Callable[..., None], str]]]] = {
    "lora": (lora.ABOUT, lora.VERBS),
    "keys": (keys.ABOUT, keys.VERBS),
    "study": (study.ABOUT, study.VERBS),
}


class Verb(typer.core.TyperCommand):
    """A verb, some of whose options have a shorter name as well."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The rest of the command line, once its options are read."""
        options = {text for parameter in self.params for text in parameter.opts}
        end = args.index("--") if "--" in args else len(args)
        told = [ALIASES[word] if ALIASES.get(word, ("",))[0] in options else (word,) for word in args[:end]]
        return super().parse_args(ctx, [*chain.from_iterable(told), *args[end:]])


def build() -> typer.Typer:
    """The whole command tree, made afresh; nothing heavy is imported before a verb runs."""
    app = typer.Typer(name="sfumato", add_completion=False, pretty_exceptions_enable=False)
    app.callback()(_top)
    for name, (function, example) in VERBS.items():
        app.command(name, cls=Verb, epilog=f"Example: {example}")(function)
    for group, (about, verbs) in GROUPS.items():
        inner = typer.Typer(help=about, no_args_is_help=True)
        for name, (verb, example) in verbs.items():
            inner.command(name, epilog=f"Example: {example}")(verb)
        app.add_typer(inner, name=group)
    return app


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; every failure becomes one line on standard error."""
    try:
        command: Any = typer.main.get_command(build())
        _refuse_empty_paths(arguments)
        code = command.main(args=list(arguments) or ["--help"], prog_name="sfumato", standalone_mode=False)
        code = code if isinstance(code, int) else 0
        if code == Cancelled.exit_code:
            _say("stopped")
        return code
    except SfumatoError as error:
        options = _options(command, arguments)
        argument = getattr(error, "argument", None)
        _complain(worded(str(error), argument, lambda field: fields.option_of(field, options)))
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _say("stopped")
        return Cancelled.exit_code
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own usage errors
            _complain(error.format_message())
            return 2
        if os.environ.get(DEBUG_VARIABLE):
            traceback.print_exc()
        _complain(f"{type(error).__name__}: {error} (set {DEBUG_VARIABLE}=1 to see where)")
        return 1


def _refuse_empty_paths(arguments: Sequence[str]) -> None:
    """`InputError` for the empty text where a path is wanted: pathlib would take it for the folder one is in."""
    if not arguments or arguments[0] not in VERBS:
        return
    empty = [
        before if text == "" else text.removesuffix("=")
        for before, text in pairwise(arguments)
        if text == "" or (text.startswith("--") and text.endswith("="))
    ]
    if not empty:
        return
    options, takes_paths = _paths(VERBS[arguments[0]][0])
    for before in empty:
        if before in options or (takes_paths and not before.startswith("-")):
            what = before if before in options else "a path"
            raise InputError(f"{what} is empty; give a file or a folder", argument=options.get(before))


def _paths(verb: Callable[..., None]) -> tuple[dict[str, str], bool]:
    """A verb's options that take a path, as they are written, to their parameters; whether its arguments are paths."""
    options: dict[str, str] = {}
    positional = False
    for name, hint in get_type_hints(verb, include_extras=True).items():
        kind, *more = get_args(hint) or (None,)
        if not ({Path, list[Path]} & {kind, *get_args(kind)}):
            continue
        told = more[0]
        if isinstance(told, typer.models.ArgumentInfo):
            positional = True
        else:
            options |= {text: name for text in (f"--{name.replace('_', '-')}", *(told.param_decls or ()))}
    return options, positional


def _options(command: Any, arguments: Sequence[str]) -> dict[str, str]:
    """`fields.options_of` the verb that a command line begins with."""
    for word in arguments:
        inner = getattr(command, "commands", {}).get(word)
        if inner is None:
            break
        command = inner
    return fields.options_of(command)


def _complain(message: str) -> None:
    _say("error: " + message)


def _say(message: str) -> None:
    line = " ".join(message.split())
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    sys.stderr.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def _version(wanted: bool) -> None:
    if wanted:
        from sfumato import __version__

        typer.echo(f"sfumato {__version__}")
        raise typer.Exit


def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Sfumato: text to pictures, and pictures to clips, by latent diffusion, with everything needed to train it."""
