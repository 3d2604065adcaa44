"""The command line: one small file per verb, one place for errors."""

from __future__ import annotations


def main() -> int:
    """Run `sfumato` with the process's arguments; returns 0 done, 1 failed, 2 bad input or 130 stopped."""
    import sys

    from sfumato.cli.app import run

    return run(sys.argv[1:])
