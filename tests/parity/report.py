"""docs/parity.md from what the parity tests measured: `python tests/parity/report.py RECORD docs/parity.md`.

RECORD holds lines of JSON, written by the tests under `pytest --parity RECORD` (see `conftest.agrees`); `make parity`
does both. A row is the worst of all cases of one test, thing and configuration.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HEAD = """# Parity

Random weights go through our networks and through the references, and the answers are compared in float32, samplers on
a denoiser with a formula in float64: ‖ours − theirs‖ / ‖theirs‖, the worst of all cases. The tests write this page:

```sh
make parity
```

"""
TABLE = "| what | configuration | against | cases | error | bound | test |\n|---|---|---|---|---|---|---|\n"


def rows(lines: Iterable[str]) -> list[dict]:
    """One for each test, thing and configuration, in the order of the record: the worst error and how many cases."""
    found: dict[tuple[str, ...], dict] = {}
    for line in lines:
        values = json.loads(line)
        key = tuple(str(values[name]) for name in ("test", "what", "configuration", "reference", "bound"))
        row = found.setdefault(key, {**values, "cases": 0})
        row["error"] = max(row["error"], values["error"])
        row["cases"] += 1
    return list(found.values())


def page(found: list[dict], versions: dict[str, str], machine: str) -> str:
    """The document. versions: of the packages compared."""
    parts = [HEAD]
    parts.append(", ".join(f"{name} {number}" for name, number in versions.items()) + f"; {machine}.\n\n")
    full = [row for row in found if row["full"]]
    for title, chosen in (
        ("Published sizes", full),
        ("Small networks, pipelines, samplers and files", [row for row in found if not row["full"]]),
    ):
        if chosen:
            parts.append(f"## {title}\n\n{TABLE}")
            parts += [_line(row) for row in chosen]
            parts.append("\n")
    if not full:
        parts.append("The published sizes were not part of this run (`make parity` runs them).\n")
    return "".join(parts).rstrip() + "\n"


def _line(row: dict) -> str:
    error = "equal" if row["error"] == 0 else f"{row['error']:.1e}"
    bound = "equal" if row["bound"] == 0 else f"{row['bound']:.0e}"
    cells = [row["what"], row["configuration"], row["reference"], str(row["cases"]), error, bound]
    return "| " + " | ".join([*(cell.replace("|", "\\|") for cell in cells), f"`{row['test']}`"]) + " |\n"


def installed(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    record, document = map(Path, sys.argv[1:])
    found = rows(record.read_text(encoding="utf-8").splitlines())
    versions = installed(("torch", "diffusers", "transformers", "k-diffusion"))
    machine = f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} CPU cores"
    document.write_text(page(found, versions, machine), encoding="utf-8")


if __name__ == "__main__":
    main()
