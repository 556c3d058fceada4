"""What a GGUF file of llama.cpp says it holds, and whether that can be true. Reads no tensor.

"GGUF"                      4 bytes; all numbers are little-endian
version, tensors, keys      uint32, uint64, uint64
keys                        name, type, value
tensors                     name, dimensions (the fastest first), kind of block, offset
data                        the tensors in that order, each aligned

A file that was split (`gguf-split`) has all keys in its first part, and some tensors in each. After
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and gguf.cpp, which reads them.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from glob import escape
from math import prod
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, Problem
from engine.loading import gguf_kinds
from engine.loading.model_json import some
from engine.loading.safetensors_header import disguise

VERSIONS = (2, 3)
AGAIN = "an interrupted download or copy? fetch it again"
ANOTHER = "take a file of the same model in another kind, as Q4_K_M, Q8_0, F16 or BF16"

_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
"""Type of a value → its format for `struct`."""
_TEXT, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf\Z")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor as its file's header describes it."""

    kind: str
    """Of its blocks: 'F32', 'Q4_K', …"""
    shape: tuple[int, ...]
    """As torch has it: the slowest dimension first."""
    file: Path
    start: int
    """Byte of the file at which it begins."""
    nbytes: int

    @property
    def numbers(self) -> int:
        """Return how many numbers it has."""
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """The keys and tensors of a file, of all its parts together."""

    file: Path
    keys: Mapping[str, Any] = field(repr=False)
    """Numbers, texts, and lists of numbers; of a list of texts its length (see `texts`)."""
    tensors: Mapping[str, Stored] = field(repr=False)
    parts: tuple[Path, ...]

    @property
    def architecture(self) -> str:
        """Return llama.cpp's word for the family."""
        return str(self.keys.get("general.architecture", ""))

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a key of the architecture: `block_count` is `llama.block_count`."""
        return self.keys.get(f"{self.architecture}.{name}", default)

    def texts(self, *names: str) -> dict[str, list[str]]:
        """Read lists of texts, such as a vocabulary, of those keys that there are."""
        with self.file.open("rb") as stream, _mapped(stream) as data:
            found = _keys(self.file, _Cursor(data), names)
        return {name: found[name] for name in names if isinstance(found.get(name), list)}

    def numbers(self, name: str) -> list[float]:
        """Read a small tensor; an empty list where the file has none of this name."""
        return [] if name not in self.tensors else list(map(float, self.array(name).flat))

    def array(self, name: str) -> Any:
        """Return a tensor, unpacked: float32, in memory of its own."""
        one = self.tensors[name]
        return gguf_kinds.unpack(one.file, one.start, one.kind, one.shape)


def read(file: Path) -> GgufHeader:
    """Read the header of a file, and of the other parts of one that was split.

    Raises CheckpointError for what is no whole GGUF file, for a part that is not here, and for
    tensors of a kind that cannot be unpacked.
    """
    files = file.parent.glob(siblings(escape(file.name)))
    states = sorted((each.name, each.stat().st_mtime_ns, each.stat().st_size) for each in files)
    return _read(file, *states)


def siblings(name: str) -> str:
    """Return the pattern of all parts of a file that was split; of another, its name."""
    return _PART.sub(lambda match: f"-?????-of-{match[2]}.gguf", name)


@lru_cache(maxsize=8)
def _read(file: Path, *_: tuple[str, int, int]) -> GgufHeader:
    keys, tensors = _one(file)
    number, count = keys.get("split.no", 0), keys.get("split.count", 1)
    if not isinstance(number, int) or not isinstance(count, int):
        raise _broken(file, f"split.no={number}, split.count={count}")
    if count < 2:
        return GgufHeader(file=file, keys=keys, tensors=tensors, parts=(file,))
    parts = list(_parts(file, number, count))
    for number, part in enumerate(parts[1:], start=1):
        others, more = _one(part)
        if (others.get("split.no"), others.get("split.count")) != (number, count):
            raise refused(part, f"{part.name} is not part {number + 1} of {count} of {file.name}")
        if both := tensors.keys() & more.keys():
            raise refused(part, f"{part.name} repeats tensors: {some(sorted(both))}")
        tensors |= more
    due = keys.get("split.tensors.count", len(tensors))
    if due != len(tensors):
        what = f"the {count} parts hold {len(tensors)} tensors, and their header says {due}"
        raise refused(file, what, AGAIN)
    return GgufHeader(file=file, keys=keys, tensors=tensors, parts=tuple(parts))


def _parts(file: Path, number: int, count: int) -> Iterator[Path]:
    """Yield the files of a split model, the first one first."""
    named = _PART.search(file.name)
    if number or named is None or int(named[1]) != 1 or int(named[2]) != count:
        first = _PART.sub("", file.name) + f"-00001-of-{count:05}.gguf"
        what = f"{file.name} is part {number + 1} of {count} of a model that was split"
        raise refused(file, what, f"name the first: load.file={first}, the others beside it")
    names = [_PART.sub(f"-{each + 1:05}-of-{count:05}.gguf", file.name) for each in range(count)]
    if missing := [name for name in names if not (file.parent / name).is_file()]:
        what = f"missing: {len(missing)} of the {count} parts of {file.name}: {some(missing)}"
        raise refused(file, what, "put all parts into this folder")
    yield from (file.parent / name for name in names)


def _one(file: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Return the keys and the tensors of a file."""
    with file.open("rb") as stream:
        start = stream.read(256)
        if found := disguise(start):
            raise _broken(file, *found)
        if start[:4] != b"GGUF":
            raise _broken(file, "it does not begin with 'GGUF'")
        with _mapped(stream) as data:
            cursor = _Cursor(data)
            try:
                keys = _keys(file, cursor)
                return keys, _tensors(file, cursor, keys, len(data))
            except (struct.error, OverflowError, UnicodeDecodeError, _Impossible) as error:
                raise _broken(file, f"{error} (byte {cursor.at:,})") from error


def _mapped(stream: Any) -> mmap.mmap:
    return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


class _Impossible(Exception):
    """What is read cannot be."""


class _Cursor:
    """A place in a file's bytes."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def numbers(self, form: str) -> tuple[Any, ...]:
        """Read numbers, and go behind them."""
        found = struct.unpack_from(form := f"<{form}", self.data, self.at)
        self.at += struct.calcsize(form)
        return found

    def text(self) -> str:
        """Read a text, and go behind it."""
        (length,) = self.numbers("Q")
        if length > len(self.data) - self.at:
            raise _Impossible(f"a text of {length:,} bytes")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def skip_texts(self, count: int) -> int:
        """Go behind a list of texts, and return how many they were."""
        data, at, unpack = self.data, self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        self.at = at
        return count

    def value(self, kind: int, whole: bool) -> Any:
        """Read the value of a key; of a list of texts its length, unless `whole`."""
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise _Impossible(f"a value of type {kind}")
        inner, count = self.numbers("IQ")
        if inner in _SCALARS:
            if count > len(self.data):
                raise _Impossible(f"a list of {count:,} numbers")
            return list(self.numbers(f"{count}{_SCALARS[inner]}"))
        if inner != _TEXT:
            raise _Impossible(f"a list of values of type {inner}")
        return [self.text() for _ in range(count)] if whole else self.skip_texts(count)


def _keys(file: Path, cursor: _Cursor, whole: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read the keys, and leave the cursor where the tensors are described."""
    cursor.at = 4
    (version,) = cursor.numbers("I")
    if version not in VERSIONS:
        other = version & 0xFFFF == 0
        why = "for computers of the other byte order" if other else f"of version {version}"
        known = "little-endian, of version " + " or ".join(map(str, VERSIONS))
        raise refused(file, f"{file.name} is a GGUF file {why}; read is: {known}")
    _, count = cursor.numbers("QQ")
    keys: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.text()
        if name in keys:
            raise _Impossible(f"the key {name} a second time")
        keys[name] = cursor.value(cursor.numbers("I")[0], name in whole)
    return keys


def _tensors(file: Path, cursor: _Cursor, keys: Mapping[str, Any], size: int) -> dict[str, Stored]:
    """Read the descriptions of the tensors, which must lie back to back in the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    count = struct.unpack_from("<Q", cursor.data, 8)[0]
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _Impossible(f"general.alignment={alignment}, which is no power of two")
    described: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = cursor.text()
        if name in described:
            raise _Impossible(f"the tensor {name} a second time")
        (dimensions,) = cursor.numbers("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise _Impossible(f"{name} has {dimensions} dimensions")
        shape = cursor.numbers(f"{dimensions}Q")[::-1]
        described[name] = (shape, *cursor.numbers("IQ"))
    _verify_kinds(file, {name: kind for name, (_, kind, _) in described.items()})
    start = end = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, (shape, number, offset) in described.items():
        kind = GGMLQuantizationType(number)
        block, width = GGML_QUANT_SIZES[kind]
        if shape[-1] % block or start + offset != end:
            raise _Impossible(f"the tensor {name} of shape {list(shape)} at {start + offset:,}")
        nbytes = prod(shape) // block * width
        if end + nbytes > size:
            raise _Impossible(f"{name} ends at byte {end + nbytes:,} of {size:,}")
        tensors[name] = Stored(kind=kind.name, shape=shape, file=file, start=end, nbytes=nbytes)
        end += -(-nbytes // alignment) * alignment
    return tensors


def _verify_kinds(file: Path, kinds: Mapping[str, int]) -> None:
    """Refuse kinds of blocks that the package `gguf` does not know, or does not unpack."""
    problems = []
    for kind in sorted(set(kinds.values())):
        why = gguf_kinds.unreadable(kind)
        if why:
            names = [name for name, each in kinds.items() if each == kind]
            problems.append(_problem(file, f"{file.name} has {why}: {some(names)}", ANOTHER))
    if problems:
        raise CheckpointError(problems)


def refused(file: Path, message: str, hint: str = ANOTHER, code: str = "gguf") -> CheckpointError:
    """Return the error that names a GGUF file."""
    return CheckpointError(_problem(file, message, hint, code))


def _problem(file: Path, message: str, hint: str, code: str = "gguf") -> Problem:
    return Problem(code=code, message=message, hint=hint, where=str(file))


def _broken(file: Path, why: str, hint: str = AGAIN) -> CheckpointError:
    return refused(file, f"{file.name} is no whole GGUF file: {why}", hint)
