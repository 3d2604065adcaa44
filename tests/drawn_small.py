"""Pictures drawn by the command line with small checkpoints, in the folder one is in, and what it refuses."""

from __future__ import annotations

import numpy as np
from PIL import Image

from sfumato.cli.app import run
from sfumato.receipts.provenance import read_recipe

LIGHT = ["--steps", "2", "--size", "32", "--dtype", "fp32"]


def draw(model: str, *arguments: str, prompt: str = "a cat", out: str = "out.png") -> np.ndarray:
    assert run(["generate", prompt, "-m", model, *LIGHT, *arguments, "-o", out]) == 0
    return pixels(out)


def again(model: str, *arguments: str) -> np.ndarray:
    """The picture like out.png, from the options that name files alone."""
    assert (
        run(["generate", "--like", "out.png", "-m", model, "--dtype", "fp32", *arguments, "-o", "again.png"])
        == 0
    )
    assert read_recipe("again.png")["request"] == read_recipe("out.png")["request"]
    return pixels("again.png")


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def parameters(path: str) -> str:
    with Image.open(path) as image:
        return image.text["parameters"]


def refused(capsys, *arguments: str) -> str:
    """The one line said of a command that exits with 2."""
    assert run(["generate", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line
