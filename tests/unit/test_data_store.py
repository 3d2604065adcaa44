"""Rows on disk: what was recorded is there, what was not is missing, and another maker's folder is refused."""

import errno
import json
import os

import numpy as np
import pytest

from sfumato.data.store import RowStore, address
from sfumato.errors import SfumatoError, StaleCacheError

FIELDS = {"rgb": (2, 3), "mask": (4,)}


def opened(folder, identity=None, count=10):
    return RowStore(folder, identity or {"seed": 1}, count, FIELDS, chunk=4)


def rows(store, chunk, add=0):
    start, stop = store.span(chunk)
    numbers = np.arange(start, stop, dtype=np.uint8) + np.uint8(add)
    return {
        "rgb": np.broadcast_to(numbers[:, None, None], (stop - start, 2, 3)),
        "mask": np.repeat(numbers[:, None], 4, 1),
    }


def test_rows_come_back_in_any_order_and_after_reopening(tmp_path):
    store = opened(tmp_path)
    assert store.missing() == [0, 1, 2] and store.span(2) == (8, 10)
    for chunk in (2, 0):
        store.put(chunk, rows(store, chunk))
        store.record(chunk)
    for again in (store, opened(tmp_path)):
        assert again.missing() == [1]
        assert again.holds([0, 9]) and not again.holds([0, 5])
        assert again.rows("rgb", [9, 0, 3, 9]).shape == (4, 2, 3)
        assert again.rows("mask", [9, 0, 3, 9])[:, 2].tolist() == [9, 0, 3, 9]


def test_what_was_not_recorded_does_not_count(tmp_path):
    store = opened(tmp_path)
    store.put(0, rows(store, 0, add=100))
    assert opened(tmp_path).missing() == [0, 1, 2]
    store.put(0, rows(store, 0))
    store.record(0)
    assert opened(tmp_path).rows("mask", [3])[0].tolist() == [3] * 4


def test_another_process_s_chunks_are_seen_after_refresh(tmp_path):
    mine, other = opened(tmp_path), opened(tmp_path)
    other.put(1, rows(other, 1))
    other.record(1)
    assert mine.missing() == [0, 1, 2]
    mine.refresh()
    assert mine.missing() == [0, 2] and mine.rows("mask", [5])[0, 0] == 5


def test_folders_made_from_something_else_are_refused(tmp_path):
    opened(tmp_path)
    with pytest.raises(StaleCacheError, match="was made from something else"):
        opened(tmp_path, {"seed": 2})
    with pytest.raises(StaleCacheError, match="was made from something else"):
        opened(tmp_path, count=11)
    (tmp_path / "mask.u8").write_bytes(b"short")
    with pytest.raises(StaleCacheError, match=r"mask\.u8 is missing or not of 40 bytes"):
        opened(tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(StaleCacheError, match="not readable JSON"):
        opened(tmp_path)


def test_wrong_rows_are_refused(tmp_path):
    store = opened(tmp_path)
    good = rows(store, 0)
    for bad in ({**good, "mask": good["mask"][:3]}, {**good, "mask": good["mask"].astype(np.float32)}):
        with pytest.raises(ValueError, match="mask must be uint8"):
            store.put(0, bad)


def test_a_full_disk_keeps_what_was_whole(tmp_path, monkeypatch):
    store = opened(tmp_path)
    store.put(0, rows(store, 0))
    store.record(0)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SfumatoError, match="No space left on device; what it held before is intact"):
            store.put(1, rows(store, 1))
        with pytest.raises(SfumatoError, match="No space left"):
            store.record(1)
    again = opened(tmp_path)
    assert again.missing() == [1, 2] and again.rows("mask", [2])[0, 0] == 2
    assert json.loads((tmp_path / "store.json").read_text())["done"] == [0]


def test_addresses_differ_with_every_value():
    identities = [{"seed": s, "size": z} for s in range(3) for z in (64, 128)]
    assert len({address(i) for i in identities}) == 6
    assert address({"a": 1, "b": 2}) == address({"b": 2, "a": 1})
