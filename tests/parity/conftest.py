"""`agrees`: two answers are near enough, and how near goes into the record from which docs/parity.md is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from helpers import relative_error


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Callable[[dict], None]:
    """Adds a line of JSON to the file named by --parity, and does nothing without it."""
    named = request.config.getoption("--parity")

    def add(values: dict) -> None:
        if named:
            with Path(named).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values) + "\n")

    return add


@pytest.fixture
def agrees(request: pytest.FixtureRequest, record: Callable[[dict], None]) -> Callable[..., None]:
    """agrees(what, configuration, ours, theirs, bound, reference): ‖ours − theirs‖ / ‖theirs‖ ≤ bound, and noted down.

    what: the network, pipeline or sampler. reference: package and name of what it is compared with. A bound of 0 is
    equality.
    """
    node: str = request.node.nodeid
    full = request.node.get_closest_marker("full") is not None

    def agree(
        what: str, configuration: str, ours: Tensor, theirs: Tensor, bound: float, reference: str
    ) -> None:
        error = relative_error(ours, theirs)
        assert error <= bound, f"{what}, {configuration}: {error:.2e} apart, at most {bound:.0e} is allowed"
        record(
            {
                "test": node.partition("[")[0],
                "case": node,
                "what": what,
                "configuration": configuration,
                "reference": reference,
                "error": error,
                "bound": bound,
                "full": full,
            }
        )

    return agree
