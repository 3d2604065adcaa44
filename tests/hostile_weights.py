"""The catalogue of hostile safetensors headers: name of the case to (bytes of the file, what is said of it)."""

from __future__ import annotations

import json


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list, begin: int, end: int, dtype: object = "F32", **more: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "seven bytes": (b"1234567", "not a safetensors file"),
    "eight bytes": (bytes(8), "not a safetensors file"),
    "header of nothing": (bytes(8) + b"{", "damaged"),
    "header of 2^63": ((2**63).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "header of 2^64 - 1": (b"\xff" * 8 + b"{}", "not a safetensors file"),
    "header over 100 MB": ((100_000_001).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "header longer than the file": ((1000).to_bytes(8, "little") + b"{}", "cut short in its header of 1,000 bytes"),
    "header no JSON": (file_of(b"{nope}"), "damaged"),
    "header no UTF-8": (file_of(b'{"\xff": 1}'), "damaged"),
    "header a list": (file_of([1]), "not a safetensors file"),
    "header with a second value": (file_of(b"{} {}"), "damaged"),
    "header nested without end": (file_of(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "recursion"),
    "header of lists": (file_of(b'{"a":[' + b"[]," * 4_000_000 + b"[]]}"), "far more parts than 200,000 tensors"),
    "duplicate tensors": (
        file_of(b'{"a":%b,"a":%b}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), bytes(4)),
        "the key a stands twice",
    ),
    "duplicate fields": (
        file_of(b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "the key dtype stands twice",
    ),
    "duplicate metadata": (file_of(b'{"__metadata__":{"a":"1","a":"2"}}'), "the key a stands twice"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "metadata"),
    "metadata no table": (file_of({"__metadata__": ["a"]}), "metadata"),
    "half a surrogate pair": (file_of(b'{"\\ud800": 1}'), "surrogate"),
    "NaN in the header": (file_of(b'{"a": NaN}'), "NaN"),
    "overlap": (file_of({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), "b overlaps"),
    "two at one place": (file_of({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)), "b overlaps"),
    "gap": (file_of({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "4 bytes before tensor b"),
    "gap at the start": (file_of({"a": entry([1], 4, 8)}, bytes(8)), "4 bytes before tensor a"),
    "shape is not bytes": (file_of({"a": entry([3], 0, 8)}, bytes(8)), r"tensor a of shape \(3,\).* 12 .* 8"),
    "shape overflows": (file_of({"a": entry([2**62, 2**62], 0, 8)}, bytes(8)), "exceeds 2"),
    "shape overflows to nothing": (file_of({"a": entry([0, 2**62, 2**62], 0, 0)}), "exceeds 2"),
    "shape wraps around to its bytes": (file_of({"a": entry([2**62 + 1, 4], 0, 16)}, bytes(16)), "exceeds 2"),
    "side of 2^63": (file_of({"a": entry([2**63, 0], 0, 0)}), "shape of tensor a must be"),
    "side of 5000 digits": (file_of(b'{"a":' + b"9" * 5000 + b"}"), "damaged"),
    "side below zero": (file_of({"a": entry([-1], 0, 4)}, bytes(4)), "shape of tensor a must be"),
    "side a fraction": (file_of({"a": entry([1.0], 0, 4)}, bytes(4)), "shape of tensor a must be"),
    "side a truth": (file_of({"a": entry([True], 0, 4)}, bytes(4)), "shape of tensor a must be"),
    "33 sides": (file_of({"a": entry([1] * 33, 0, 4)}, bytes(4)), "shape of tensor a must be at most 32"),
    "a million sides": (file_of({"a": entry([2**40] * 1_000_000, 0, 4)}, bytes(4)), "at most 32"),
    "shape no list": (file_of({"a": entry("x", 0, 4)}, bytes(4)), "shape of tensor a must be"),
    "offset below zero": (file_of({"a": entry([1], -4, 0)}, bytes(4)), "offsets of tensor a must be"),
    "offsets that fall": (file_of({"a": entry([1], 8, 4)}, bytes(8)), "offsets of tensor a must be"),
    "three offsets": (
        file_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, bytes(4)),
        "offsets of tensor a must be two",
    ),
    "unknown dtype": (file_of({"a": entry([1], 0, 4, "F33")}, bytes(4)), "tensor a is of the dtype F33; known are"),
    "dtype a list": (file_of({"a": entry([1], 0, 4, [])}, bytes(4)), "dtype"),
    "a field more": (file_of({"a": entry([1], 0, 4, code="x")}, bytes(4)), "nothing else"),
    "a field less": (file_of({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "data_offsets"),
    "tensor no table": (file_of({"a": [1]}, bytes(4)), "tensor a must have"),
    "truncated": (file_of({"a": entry([4], 0, 16)}, bytes(8)), "cut short: its tensors end at byte 86, the file at 78"),
    "trailing data": (file_of({"a": entry([1], 0, 4)}, bytes(8)), "4 bytes after its last tensor"),
    "data of no tensor": (file_of({}, bytes(1)), "1 bytes after its last tensor"),
    "terminal codes in a name": (file_of({"\x1b[2J": entry([3], 0, 4)}, bytes(4)), r"'\\x1b\[2J'"),
    "a name of a megabyte": (file_of({"n" * 10**6: entry([3], 0, 4)}, bytes(4)), "tensor 'nnn"),
}  # fmt: skip
