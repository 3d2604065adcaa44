"""What tests of the page share: a browser, a server with prices, and a gallery with two pictures in it."""

from __future__ import annotations

import pytest

from browsing import SHAPES, Visitor, chromium
from serving import PRICES, Client, Server
from sfumato.serve import keys


@pytest.fixture(scope="session")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    place = tmp_path_factory.mktemp("page")
    (place / "prices.toml").write_text(PRICES)
    running = Server(place / "data", "--prices", str(place / "prices.toml"), "--deadline", "3600")
    yield running.start(600)
    running.kill()


@pytest.fixture(scope="session")
def client(server):
    return Client(server)


@pytest.fixture(scope="module")
def gallery(client):
    """Two pictures, as somebody drew them before."""
    return [client.wait(client.submit({"prompt": text, "seed": seed})["id"]) for text, seed in SHAPES]


@pytest.fixture
def visitor(server, browser, gallery):
    """Somebody who has just come, to a gallery with two pictures at least."""
    found = Visitor(browser, server.url)
    yield found.ready()
    found.close()


@pytest.fixture(scope="session")
def guarded(tmp_path_factory):
    """A server with keys, and its keys by name."""
    place = tmp_path_factory.mktemp("keys")
    (place / "prices.toml").write_text(PRICES)
    file = place / "keys.json"
    limits = {"a": {}, "b": {}, "poor": {"budget": 3_000}, "many": {}}
    found = {name: keys.add(file, name, **more)[0] for name, more in limits.items()}
    running = Server(place / "data", "--keys", str(file), "--prices", str(place / "prices.toml"))
    yield running.start(600), found
    running.kill()
