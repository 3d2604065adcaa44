"""Two tenants, of whatever server and ring of keys a file of tests has."""

from __future__ import annotations

import pytest

from serving import Client


@pytest.fixture(scope="module")
def a(server, ring):
    return Client(server, ring[1]["a"])


@pytest.fixture(scope="module")
def b(server, ring):
    return Client(server, ring[1]["b"])
