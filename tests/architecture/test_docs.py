"""What the documents say of the code is there: tests by name, tables, links."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

from sfumato.cli.app import build

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


def commands(document: Path) -> list[list[str]]:
    """The words of every `sfumato …` in the document's blocks of shell, without comments and what is piped after it."""
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line.removeprefix("$ ").removeprefix(".venv/bin/"), comments=True)
        if words[:1] == ["sfumato"]:
            ends = [k for k, word in enumerate(words) if word in {"|", "&", "&&", ";", ">", "<"}]
            found.append(words[1 : min(ends, default=len(words))])
    return found


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_commands_name_verbs_and_options_that_exist(document):
    for words in commands(document):
        command, rest = typer.main.get_command(build()), list(words)
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            assert rest[0] in command.commands, f"{document.name}: sfumato {' '.join(words)}"
            command = command.commands[rest.pop(0)]
        known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {
            "--help"
        }
        for word in rest:
            option = word.partition("=")[0]
            if re.fullmatch(r"-[a-z]|--[a-z][\w-]*", option):
                assert option in known, f"{document.name}: sfumato {' '.join(words)} has no {option}"


def test_there_are_commands_in_the_documents():
    assert sum(len(commands(document)) for document in DOCS) > 100
