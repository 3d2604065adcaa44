"""A Python for tests in which checkpoints have the sizes of the small ones here, in every process that it starts.

`small_python(folder)` writes it and gives its path. It is run as `PYTHON -m MODULE …`, as any other.
"""

from __future__ import annotations

import os
import runpy
import shlex
import sys
from pathlib import Path

NAME = "SMALL_PYTHON"


def small_python(folder: Path) -> Path:
    """An executable in `folder`."""
    place = folder / "small-python"
    words = [sys.executable, str(Path(__file__).resolve())]
    place.write_text(f'#!/bin/sh\n{NAME}={shlex.quote(str(place))} exec {shlex.join(words)} "$@"\n')
    place.chmod(0o755)
    return place


def main() -> None:
    import small_sd
    import small_svd
    from sfumato.families.sd import shapes as sd
    from sfumato.families.svd import shapes as svd

    sd.SYSTEMS.update(small_sd.SMALL)
    svd.SYSTEMS.update(small_svd.SMALL)
    sys.executable = os.environ[NAME]
    option, module, *rest = sys.argv[1:]
    assert option == "-m", sys.argv
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
