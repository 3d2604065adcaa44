"""What the documents say of the code is there: tests by name, tables, links."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_tests_that_are_named_are_there(document):
    for file, function in re.findall(r"\b(tests/[\w/]+\.py)::(\w+)", document.read_text(encoding="utf-8")):
        path = REPOSITORY / file
        assert path.is_file(), f"{document.name} names {file}"
        assert f"\ndef {function}(" in path.read_text(encoding="utf-8"), (
            f"{document.name}: {file}::{function}"
        )


def test_the_parity_page_names_every_file_that_measures():
    page = (REPOSITORY / "docs" / "parity.md").read_text(encoding="utf-8")
    measuring = [
        p
        for p in (REPOSITORY / "tests" / "parity").glob("test_*.py")
        if "agrees(" in p.read_text(encoding="utf-8")
    ]
    assert len(measuring) >= 7
    for path in measuring:
        assert f"`tests/parity/{path.name}::" in page, f"run `make parity`: docs/parity.md lacks {path.name}"


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_tables_of_samplers_are_those_of_the_code():
    spec = importlib.util.spec_from_file_location("tables", REPOSITORY / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.written(page) == page, "run `python docs/tables.py`"
