"""A folder of pictures gives nothing that lies outside of it, whatever its files say."""

import json
import os

import pytest

from folders import fill, put, read, reasons, refusal
from sfumato.data.discover import MAX_METADATA_BYTES, MAX_ROW_BYTES, discover


class TestNothingOutsideIsRead:
    @pytest.mark.parametrize(
        "name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "..\\secret.png", "C:\\x.png", ""]
    )
    def test_metadata(self, tmp_path, name):
        folder = tmp_path / "set"
        put(tmp_path, "secret.png")
        put(folder, "fine.png")
        rows = [{"file_name": "fine.png", "text": "fine"}, {"file_name": name, "text": "hostile"}]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = read(folder)
        assert len(source) == 1
        assert ("leaves the folder" if name else "is not a file name") in source.problems[0].reason

    def test_a_link_for_metadata(self, tmp_path):
        folder = tmp_path / "set"
        put(folder, "fine.png")
        rows = tmp_path / "rows.jsonl"
        rows.write_text(json.dumps({"file_name": "fine.png", "text": "fine"}))
        (folder / "metadata.jsonl").symlink_to(rows)
        assert "'metadata.jsonl' is a link that leaves the folder" in refusal(folder)
        rows.rename(folder / "rows.jsonl")
        (folder / "metadata.jsonl").unlink()
        (folder / "metadata.jsonl").symlink_to(folder / "rows.jsonl")
        assert len(read(folder)) == 1

    def test_links(self, tmp_path):
        secret = put(tmp_path, "secret.png", "secret words")
        folder = fill(tmp_path / "set")
        (folder / "out.png").symlink_to(secret)
        (folder / "out.txt").write_text("a link out")
        put(folder, "words.png")
        (folder / "words.txt").symlink_to(tmp_path / "secret.txt")
        (folder / "in.png").symlink_to(folder / "p000.png")
        (folder / "in.txt").write_text("a link inside is fine")
        (folder / "dead.png").symlink_to(folder / "nothing")
        (folder / "outside").symlink_to(tmp_path)
        source = read(folder)
        assert {"out.png", "words.png", "dead.png"} == set(reasons(source))
        assert "is a link that leaves the folder" in reasons(source)["out.png"]
        assert "is a link that leaves the folder" in reasons(source)["words.png"]
        assert len(source) == 5

    def test_a_pipe_is_not_waited_for(self, tmp_path):
        fill(tmp_path)
        os.mkfifo(tmp_path / "pipe.png")
        put(tmp_path, "x.png")
        os.mkfifo(tmp_path / "x.txt")
        assert reasons(read(tmp_path)) == {
            "pipe.png": "is not a regular file",
            "x.png": "the caption x.txt is not a regular file",
        }

    def test_metadata_of_no_sensible_size(self, tmp_path):
        put(tmp_path, "a.png")
        rows = tmp_path / "metadata.jsonl"
        line = json.dumps({"file_name": "a.png", "text": "a"}).encode()
        rows.write_bytes(b"\xef\xbb\xbf" + b'{"x": "' + b"x" * MAX_ROW_BYTES + b'"}\n' + line + b"\n")
        source = read(tmp_path)
        assert [str(p) for p in source.problems] == [
            f"metadata.jsonl line 1: is longer than {MAX_ROW_BYTES:,} bytes"
        ]
        assert len(source) == 1
        with open(rows, "r+b") as stream:
            stream.truncate(MAX_METADATA_BYTES + 1)  # a sparse file: no such bytes are on the disk
        assert f"at most {MAX_METADATA_BYTES:,} are read" in refusal(tmp_path)

    def test_bad_metadata_lines(self, tmp_path):
        put(tmp_path, "a.png")
        lines = [
            '{"file_name": "a.png", "text": "a"}',
            "{broken",
            "[1]",
            '{"text": "t"}',
            '{"file_name": "a.png"}',
        ]
        lines += [
            '{"file_name": "gone.png", "text": "t"}',
            '{"file_name": "a.png", "text": "again"}',
            "[" * 99_999,
        ]
        lines += ['{"file_name": "a.png", "text": "\\ud800"}', '{"file_name": "a.png", "text": 5}']
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
        found = discover(tmp_path)
        assert [str(p) for p in found.problems] == [
            "metadata.jsonl line 2: is not JSON",
            "metadata.jsonl line 3: is not a JSON object",
            "metadata.jsonl line 4: has no file_name",
            "a.png: has no text in line 5 of metadata.jsonl",
            "gone.png: is named in line 6 of metadata.jsonl but is not there",
            "a.png: is named twice in metadata.jsonl, in lines 1 and 7",
            "metadata.jsonl line 8: is not JSON",
            "a.png: the caption in line 9 of metadata.jsonl holds half of a surrogate pair",
            "a.png: the caption in line 10 of metadata.jsonl is int, not text",
        ]
