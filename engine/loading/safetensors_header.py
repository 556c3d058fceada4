"""What a safetensors file says it holds, and whether that can be true. Needs no torch.

8 bytes   length of the header, little-endian
header    JSON: name → {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__"
data      the tensors, back to back
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from engine.errors import CheckpointError, Problem

MAX_HEADER = 100_000_000
"""Bytes that a header may have: the limit of the safetensors library."""

DTYPE_BITS = {
    **dict.fromkeys(["F4"], 4),
    **dict.fromkeys(["F6_E2M3", "F6_E3M2"], 6),
    **dict.fromkeys(["BOOL", "U8", "I8", "F8_E8M0"], 8),
    **dict.fromkeys(["F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ"], 8),
    **dict.fromkeys(["I16", "U16", "F16", "BF16"], 16),
    **dict.fromkeys(["I32", "U32", "F32"], 32),
    **dict.fromkeys(["I64", "U64", "F64", "C64"], 64),
}
"""Bits per element of every dtype of the format."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""Those of plain weights."""

_CHUNK = 2**24
_AGAIN = "an interrupted download or copy, or a full disk? fetch this file again"
_DAMAGED = "the file is damaged or was not written by safetensors: fetch this file again"


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor as its file's header describes it."""

    dtype: str
    """The format's name, such as 'BF16'."""
    shape: tuple[int, ...]
    nbytes: int
    file: Path


Header = dict[str, TensorInfo]
"""Tensors by name, in the order of their bytes."""


def read_header(file: Path) -> Header:
    """Return the tensors that a safetensors file holds.

    Raises CheckpointError, with expected and actual bytes and the likely cause, when the header
    is not one, or when it does not describe exactly the bytes that follow it.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            body = stream.read(length if length <= MAX_HEADER else 256)
    except OSError as error:
        raise CheckpointError(_problem(file, f"cannot be read: {error.strerror}")) from error
    _verify_length(file, size, length, start + body[:256])
    header = _tensors(file, _parse(file, body))
    _verify_data(file, header, size - 8 - length)
    return header


def tensor_digest(file: Path, name: str) -> str:
    """Return a digest of a tensor's kind and bytes, of a file whose header was read before."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(length))[name]
        begin, end = entry["data_offsets"]
        stream.seek(8 + length + begin)
        found = hashlib.sha256(f"{entry['dtype']} {entry['shape']}".encode())
        for start in range(begin, end, _CHUNK):
            found.update(stream.read(min(_CHUNK, end - start)))
    return found.hexdigest()


def disguise(start: bytes) -> tuple[str, str] | None:
    """Say what a file that begins like this is instead of a model's file, and what to do."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself", "run `git lfs pull` in the model's folder"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            "an HTML page, not the file itself",
            "a login page or a proxy's answer was saved: log in, or fetch the file another way",
        )
    return None


def _problem(file: Path, message: str, hint: str = _DAMAGED) -> Problem:
    return Problem(code="safetensors", message=f"{file.name} {message}", hint=hint, where=str(file))


def _verify_length(file: Path, size: int, length: int, start: bytes) -> None:
    if found := disguise(start):
        raise CheckpointError(_problem(file, f"is {found[0]} ({size} bytes)", found[1]))
    if size < 8:
        what = "is empty (0 bytes)" if size == 0 else f"has {size} bytes, its header alone needs 8"
        raise CheckpointError(_problem(file, what, _AGAIN))
    if length > MAX_HEADER:
        limit = f"says its header has {length} bytes, more than the format's {MAX_HEADER}"
        raise CheckpointError(_problem(file, limit))
    if 8 + length > size:
        cut = f"ends within its header: expected {8 + length} bytes, there are {size}"
        raise CheckpointError(_problem(file, cut, _AGAIN))


def _parse(file: Path, body: bytes) -> dict[str, Any]:
    try:
        header = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(_problem(file, f"has a header that is not JSON: {error}")) from error
    if not isinstance(header, dict):
        raise CheckpointError(_problem(file, "has a header that is not a JSON object"))
    header.pop("__metadata__", None)
    return header


def _tensors(file: Path, header: dict[str, Any]) -> Header:
    """Return the tensors in order of their bytes, which must leave no gap and not overlap."""
    entries = [(_offsets(file, name, entry), name, entry) for name, entry in header.items()]
    position = 0
    tensors: Header = {}
    for (begin, end), name, entry in sorted(entries, key=lambda item: item[:2]):
        if begin != position:
            gap = f"has tensor {name} at byte {begin} of its data, expected at {position}"
            raise CheckpointError(_problem(file, gap))
        nbytes = _nbytes(file, name, entry)
        if end - begin != nbytes:
            shape = f"{entry['dtype']} of shape {entry['shape']}"
            wrong = f"gives tensor {name} {end - begin} bytes; {shape} has {nbytes}"
            raise CheckpointError(_problem(file, wrong))
        position = end
        tensors[name] = TensorInfo(
            dtype=entry["dtype"], shape=tuple(entry["shape"]), nbytes=nbytes, file=file
        )
    return tensors


def _offsets(file: Path, name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if _whole(offsets) and len(offsets) == 2:
        return offsets[0], offsets[1]
    raise CheckpointError(_problem(file, f"has no valid data_offsets for tensor {name}"))


def _nbytes(file: Path, name: str, entry: dict[str, Any]) -> int:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        known = f"the format has {', '.join(DTYPE_BITS)}"
        raise CheckpointError(_problem(file, f"has tensor {name} of unknown dtype {dtype}", known))
    if not _whole(shape):
        raise CheckpointError(_problem(file, f"has tensor {name} of impossible shape {shape}"))
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise CheckpointError(_problem(file, f"has tensor {name} of {bits} bits: no whole bytes"))
    return bits // 8


def _whole(numbers: Any) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)


def _verify_data(file: Path, header: Header, actual: int) -> None:
    expected = sum(tensor.nbytes for tensor in header.values())
    sizes = f"expected {expected} bytes of tensors, there are {actual}"
    if actual < expected:
        raise CheckpointError(
            _problem(file, f"is {expected - actual} bytes too short: {sizes}", _AGAIN)
        )
    if actual > expected:
        hint = "something was appended, or two downloads went to one file: fetch this file again"
        raise CheckpointError(
            _problem(file, f"has {actual - expected} trailing bytes: {sizes}", hint)
        )
