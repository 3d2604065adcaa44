"""The files of the page: each is served, as what it is, under a policy that lets nothing else in."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from asgi import asked, desk_of
from sfumato.serve.web.app import build
from sfumato.serve.web.status import MEDIA, PAGE

FILES = sorted(path.relative_to(PAGE).as_posix() for path in PAGE.rglob("*") if path.is_file())
TEXTS = [name for name in FILES if not name.endswith(".woff2")]
MODULES = [name for name in FILES if name.endswith(".js")]
NAMESPACE = "http://www.w3.org/2000/svg"  # a name, which nobody fetches


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with desk_of(tmp_path_factory.mktemp("page")) as found:
        yield build(found)


def ask(app, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a GET."""
    return asked(app, "GET", path, **headers)


class Document(HTMLParser):
    """What of a document is looked at: every element with its attributes, and the text of scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def all(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.elements if name in attrs]


@pytest.fixture(scope="module")
def document():
    return Document((PAGE / "index.html").read_text())


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_served_as_what_it_is(app, name):
    status, headers, body = ask(app, f"/page/{name}")
    assert status == 200 and body == (PAGE / name).read_bytes()
    assert headers["content-type"] == MEDIA[Path(name).suffix]
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "style-src 'self'" in policy
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"


def test_the_page_is_at_the_root(app):
    status, headers, body = ask(app, "/")
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    assert body == (PAGE / "index.html").read_bytes()


def test_what_a_browser_has_is_not_sent_again(app):
    _, headers, _ = ask(app, "/page/js/main.js")
    assert headers["cache-control"] == "no-cache"
    status, again, body = ask(app, "/page/js/main.js", if_none_match=headers["etag"])
    assert (status, body, again["etag"]) == (304, b"", headers["etag"])
    assert ask(app, "/page/js/api.js", if_none_match=headers["etag"])[0] == 200


@pytest.mark.parametrize("name", TEXTS)
def test_nothing_comes_from_elsewhere(name):
    text = (PAGE / name).read_text().replace(NAMESPACE, "")
    if name != "fonts/OFL.txt":  # says who made the type
        assert not re.search(r"https?:|[\"'(]//\w", text)


def test_no_script_and_no_style_stands_in_the_document(document):
    assert not document.all("style")
    assert "style" not in [tag for tag, _ in document.elements]
    assert all("src" in attrs for tag, attrs in document.elements if tag == "script")
    assert not [name for _, attrs in document.elements for name in attrs if name.startswith("on")]


def test_what_the_document_names_is_there(document):
    names = [value for value in document.all("src") + document.all("href") if value.startswith("page/")]
    assert names and not [name for name in names if name.removeprefix("page/") not in FILES]
    styles = [name for name in FILES if name.endswith(".css")]
    assert not [name for name in MODULES + styles if f"page/{name}" not in names], "each is fetched at once"


def test_ids_are_there_once_and_are_the_ones_that_are_asked_for(document):
    ids = document.all("id")
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[a-z][a-z-]*", each) for each in ids)
    asked = {each for name in MODULES for each in re.findall(r'\$\("([\w-]+)"\)', (PAGE / name).read_text())}
    assert asked and not asked - set(ids)
    named = [value for name in ("for", "aria-labelledby", "aria-describedby") for value in document.all(name)]
    assert not {word for value in named for word in value.split()} - set(ids)


def exported(module: str) -> set[str]:
    text = (PAGE / "js" / module).read_text()
    return set(re.findall(r"export (?:async )?(?:function\*?|class|const) ([\w$]+)", text))


@pytest.mark.parametrize("name", MODULES)
def test_modules_import_what_others_export(name):
    text = (PAGE / name).read_text()
    for words, file in re.findall(r'import \{([^}]*)\} from "\./([\w.]+)"', text):
        assert not {word.split(" as ")[0].strip() for word in words.split(",") if word.strip()} - exported(
            file
        )
    for space, file in re.findall(r'import \* as (\w+) from "\./([\w.]+)"', text):
        assert not set(re.findall(rf"(?<!/)\b{space}\.(\w+)", text)) - exported(file)


@pytest.mark.parametrize("name", MODULES)
def test_text_is_never_made_into_html(name):
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", (PAGE / name).read_text()
    )
