"""What tests of servers share: a server with keys and prices, its tenants, and pocket beside it.

A file that needs another server has a `server` and a `ring` of its own; the rest goes with these.
"""

from __future__ import annotations

import pytest

from serving import PRICES, Client, Server
from sfumato import load
from sfumato.serve import keys

LIMITS = {
    "a": {}, "b": {}, "watch": {"role": keys.WATCH}, "poor": {"budget": 3_000}, "slow": {"rate": 2},
    "narrow": {"queue": 1}, "leaving": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    """A file of keys, and these by name."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    return file, {name: keys.add(file, name, **more)[0] for name, more in LIMITS.items()}


@pytest.fixture(scope="module")
def server(tmp_path_factory, ring):
    place = tmp_path_factory.mktemp("serve")
    (place / "prices.toml").write_text(PRICES)
    options = ("--keys", str(ring[0]), "--prices", str(place / "prices.toml"), "--queue", "24")
    running = Server(place / "data", *options)
    yield running.start()
    running.kill()


@pytest.fixture(scope="module")
def a(server, ring):
    return Client(server, ring[1]["a"])


@pytest.fixture(scope="module")
def b(server, ring):
    return Client(server, ring[1]["b"])


@pytest.fixture(scope="module")
def watch(server, ring):
    """Who may see what is counted, and nothing else."""
    return Client(server, ring[1]["watch"])


@pytest.fixture(scope="module")
def metrics(watch):
    """What Prometheus reads now, by name."""
    from prometheus_client.parser import text_string_to_metric_families

    def read() -> dict[str, float]:
        families = text_string_to_metric_families(watch.get("/metrics").text)
        return {sample.name: sample.value for family in families for sample in family.samples}

    return read


@pytest.fixture(scope="module")
def pocket():
    return load("pocket", "cpu")
