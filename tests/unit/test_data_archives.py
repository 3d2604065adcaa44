"""Archives of pictures: read as folders are, and never trusted."""

import io
import os
import pickle
import tarfile

import pytest

from folders import picture, read, reasons, refusal


class TestArchives:
    def png(self, colour=(1, 2, 3)):
        stream = io.BytesIO()
        picture(colour).save(stream, "PNG")
        return stream.getvalue()

    def tar(self, path, members, mode="w"):
        with tarfile.open(path, mode) as archive:
            for name, content in members:
                info = tarfile.TarInfo(name)
                if isinstance(content, bytes):
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
                else:
                    info.type, info.linkname = content["type"], "/etc/passwd"
                    archive.addfile(info)
        return path

    def test_samples(self, tmp_path):
        members = [("s/a.png", self.png()), ("s/a.txt", b"first"), ("s/b.jpg", self.png((9, 9, 9)))]
        members += [
            ("s/b.json", b'{"caption": "second"}'),
            ("s/b.seg.png", self.png()),
            ("c.png", self.png()),
        ]
        self.tar(tmp_path / "x-000.tar", members)
        self.tar(tmp_path / "x-001.tar", [("a.png", self.png((5, 5, 5))), ("a.caption", b"third")])
        for source in (read(tmp_path), read(tmp_path)):
            assert source.layout == "WebDataset archives"
            assert [source.caption(i) for i in range(3)] == ["first", "second", "third"]
            assert source.pixels([0, 1, 2])[:, 0, 0, 0].tolist() == [1, 9, 5]
            assert reasons(source) == {
                "x-000.tar:c": "has no caption (.txt, .caption or .json)",
                "x-000.tar:*.seg.png": "1 members left unopened; "
                "only png, jpg, jpeg, webp, txt, caption, json are read",
            }
        assert len(read(tmp_path / "x-001.tar")) == 1

    def test_archives_of_one_name_are_told_apart_in_the_cache(self, tmp_path):
        colours = {"one": (250, 0, 0), "two": (0, 0, 250)}
        for folder, colour in colours.items():
            (tmp_path / "data" / folder).mkdir(parents=True)
            members = [("a.png", self.png(colour)), ("a.txt", folder.encode())]
            self.tar(tmp_path / "data" / folder / "x.tar", members)
        for _ in range(2):  # checked, then remembered
            source = read(tmp_path / "data", cache=tmp_path / "cache")
            drawn = {source.caption(i): tuple(source.pixels([i])[0, 0, 0].tolist()) for i in range(2)}
            assert drawn == colours

    def test_pickles_are_never_opened(self, tmp_path):
        mark = tmp_path / "ran"

        class Hostile:
            def __reduce__(self):
                return os.mkdir, (str(mark),)

        bad = pickle.dumps(Hostile())
        members = [
            ("a.png", self.png()),
            ("a.txt", b"fine"),
            ("a.pkl", bad),
            ("a.pyd", bad),
            ("b.png", bad),
            ("b.txt", b"x"),
        ]
        source = read(self.tar(tmp_path / "x.tar", members))
        assert len(source) == 1 and not mark.exists()
        assert {"x.tar:*.pkl", "x.tar:*.pyd", "x.tar:b"} == set(reasons(source))

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("../a.png", b"x"),
            ("/etc/a.png", b"x"),
            ("b/../../a.png", b"x"),
            ("..\\a.png", b"x"),
            ("a.png", {"type": tarfile.SYMTYPE}),
            ("a.png", {"type": tarfile.LNKTYPE}),
            ("a.png", {"type": tarfile.CHRTYPE}),
            ("a.png", {"type": tarfile.BLKTYPE}),
            ("a.png", {"type": tarfile.FIFOTYPE}),
        ],
    )
    def test_an_unsafe_member_refuses_the_archive(self, tmp_path, name, content):
        members = [("good.png", self.png()), ("good.txt", b"good"), (name, content)]
        text = refusal(self.tar(tmp_path / "x.tar", members))
        assert "it is refused" in text and repr(name) in text

    @pytest.mark.parametrize(
        "headers",
        [{"GNU.sparse.map": "a,b"}, {"GNU.sparse.size": "zz"}, {"size": "-1536"}, {"size": "9" * 30}],
        ids=str,
    )
    def test_extended_headers_that_are_no_numbers_refuse_the_archive(self, tmp_path, headers):
        with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            for name, content in (("a.png", self.png()), ("a.txt", b"fine")):
                info = tarfile.TarInfo(name)
                info.size, info.pax_headers = len(content), headers
                archive.addfile(info, io.BytesIO(content))
        assert "x.tar" in refusal(tmp_path / "x.tar")

    @pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
    def test_a_long_chain_of_headers_refuses_the_archive(self, tmp_path, kind):
        header = tarfile.TarInfo("x")
        header.type = kind
        (tmp_path / "x.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) * 3000)
        assert "x.tar" in refusal(tmp_path / "x.tar")

    @pytest.mark.parametrize("size", [2**40, 2**70])
    def test_a_header_larger_than_any_file_refuses_the_archive(self, tmp_path, size):
        header = tarfile.TarInfo("x")
        header.type, header.size = tarfile.GNUTYPE_LONGNAME, size
        (tmp_path / "x.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) * 2)
        assert "x.tar" in refusal(tmp_path / "x.tar")

    def test_compressed_cut_and_foreign_tars(self, tmp_path):
        members = [("a.png", self.png()), ("a.txt", b"fine")]
        assert "compressed" in refusal(self.tar(tmp_path / "z.tar", members, "w:gz"))
        data = self.tar(tmp_path / "cut.tar", members).read_bytes()
        (tmp_path / "cut.tar").write_bytes(data[:600])
        refusal(tmp_path / "cut.tar")
        (tmp_path / "no.tar").write_bytes(b"")
        refusal(tmp_path / "no.tar")
