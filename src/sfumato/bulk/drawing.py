"""Drawing a file of prompts into a folder, so that it can be stopped anywhere and started again.

A picture's name holds its line and a hash of all that decides it: the request, the model's weights, the precision. It
appears whole or not at all, so what is there is done, and a line that was changed since is drawn anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.bulk.prompts import Line
from sfumato.errors import DataError, InputError
from sfumato.receipts.bill import drawn
from sfumato.receipts.provenance import check_recipe, targets
from sfumato.storage import read_json, write_json

if TYPE_CHECKING:
    from sfumato.generate import Model
    from sfumato.types import Request

BILL = "bill.json"
DIGITS, HASH = 6, 10
SUMMED = ("pictures", "total_seconds", "megapixel_steps", "joules", "money")


@dataclass(frozen=True)
class Task:
    """A line that is to be drawn. request: complete. output: its file, or what its several files are named after."""

    number: int
    request: Request
    output: Path


def tasks(model: Model, lines: Sequence[Line], folder: Path, suffix: str = ".png") -> list[Task]:
    """All of them, in the order of the file. `DataError` naming the line for what this model cannot draw."""
    who = [model.named(), str(model.dtype)]
    found = []
    for line in lines:
        try:
            request = model.complete(line.request)
            if request.moves:
                raise InputError("clips are drawn by sfumato animate", argument="frames")
            check_recipe(request, suffix)
        except InputError as error:
            raise DataError(f"line {line.number} of the prompts: {error}", argument="prompts") from None
        digest = hashlib.sha256(json.dumps([who, request.to_dict()], sort_keys=True).encode()).hexdigest()
        found.append(Task(line.number, request, folder / f"{line.number:0{DIGITS}}-{digest[:HASH]}{suffix}"))
    return found


def missing(wanted: Iterable[Task]) -> list[Task]:
    """Those of which a picture is not there."""
    return [task for task in wanted if not all(map(os.path.exists, targets(task.output, task.request.count)))]


def draw(model: Model, task: Task) -> dict[str, Any]:
    """Draw a task and write its pictures; returns their receipt."""
    result = drawn(model, task.request)
    result.save(task.output)
    return result.recipe["receipt"]


def draw_here(model: Model, wanted: Sequence[Task]) -> Iterator[dict[str, Any]]:
    """Draw tasks one after the other, with their receipts as they are done."""
    for task in wanted:
        yield draw(model, task)


def add_bill(folder: Path, receipts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was drawn into a folder in all, kept there as `bill.json`: that of earlier runs and of this one."""
    file = folder / BILL
    before = read_json(file) if file.is_file() else {}
    total: dict[str, Any] = {}
    for name in SUMMED:
        known = [bill[name] for bill in (before, *receipts) if bill.get(name) is not None]
        total[name] = round(sum(known), 6) if known else None
    flops = [sum(receipt["flops"].values()) for receipt in receipts if receipt.get("flops")]
    total["flops"] = before.get("flops", 0) + sum(flops)
    currencies = {bill["currency"] for bill in (before, *receipts) if bill.get("currency")}
    total["currency"] = currencies.pop() if len(currencies) == 1 else None
    write_json(file, total)
    return total
