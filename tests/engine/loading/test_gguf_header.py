"""The header of a GGUF file: as the package `gguf` reads it, or refused with the reason."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import CheckpointError
from engine.loading import gguf_header
from tests.gguf_files import write_file

gguf: Any = pytest.importorskip("gguf")

KEYS = {
    "general.name": "tiny",
    "llama.block_count": 1,
    "llama.rope.freq_base": 5000.0,
    "llama.attention.causal": True,
    "llama.offset": -3,
    "llama.widths": [4, 5, 6],
    "tokenizer.ggml.tokens": ["<s>", "é", "Ġa"],
}
TENSORS = {
    "token_embd.weight": np.arange(96, dtype=np.float32).reshape(3, 32),
    "output_norm.weight": np.arange(5, dtype=np.float32),
    "blk.0.ffn_gate_exps.weight": np.arange(2 * 4 * 32, dtype=np.float32).reshape(2, 4, 32),
}


def small(folder: Path, **options: Any) -> Path:
    """Write a small file."""
    return write_file(folder / "x.gguf", "llama", KEYS, TENSORS, **options)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_keys_and_tensors_are_as_gguf_reads_them(tmp_path: Path, kind: str) -> None:
    file = small(tmp_path, kind=kind)
    header, reader = gguf_header.read(file), gguf.GGUFReader(file)
    for name, entry in reader.fields.items():
        if not name.startswith("GGUF.") and name != "tokenizer.ggml.tokens":
            assert header.keys[name] == entry.contents()
    assert header.architecture == "llama"
    assert header.get("block_count") == 1
    assert header.keys["tokenizer.ggml.tokens"] == 3
    assert header.texts("tokenizer.ggml.tokens", "tokenizer.ggml.merges") == {
        "tokenizer.ggml.tokens": ["<s>", "é", "Ġa"]
    }
    assert list(header.tensors) == [each.name for each in reader.tensors]
    for each in reader.tensors:
        stored = header.tensors[each.name]
        assert (stored.kind, stored.nbytes) == (each.tensor_type.name, each.n_bytes)
        assert stored.start == each.data_offset
        due = gguf.dequantize(each.data, each.tensor_type)
        assert np.array_equal(header.array(each.name), due)
        assert header.array(each.name).flags.owndata or header.array(each.name).base is not None
    assert header.numbers("output_norm.weight") == [0, 1, 2, 3, 4]
    assert header.numbers("rope_freqs.weight") == []


def packed(kind: Any) -> np.ndarray:
    """Return blocks of a kind, with scales that are finite: two rows of 512 numbers."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return np.random.default_rng(7).integers(0, 0x3C, (2, 512 // block * size), np.uint8)


@pytest.mark.parametrize("kind", list(gguf.GGMLQuantizationType), ids=lambda kind: kind.name)
def test_every_kind_of_blocks_is_unpacked_or_named(tmp_path: Path, kind: Any) -> None:
    file = write_file(tmp_path / "x.gguf", "llama", KEYS, {"a.weight": packed(kind)}, kind.name)
    try:
        expected = gguf.dequantize(packed(kind), kind)
    except NotImplementedError:
        with pytest.raises(
            CheckpointError, match=rf"of kind {kind.name}, which gguf .* not unpack"
        ):
            gguf_header.read(file)
        return
    array = gguf_header.read(file).array("a.weight")
    assert array.shape == (2, 512)
    assert np.isfinite(array).all()
    assert array.std() > 0
    assert np.array_equal(array, expected)


@pytest.mark.parametrize(
    ("number", "name"),
    [(31, "Q4_0_4_4, which llama.cpp reads no more"), (99, "99, unknown to gguf")],
)
def test_kinds_that_gguf_does_not_know_are_named(tmp_path: Path, number: int, name: str) -> None:
    file = small(tmp_path)
    content = bytearray(file.read_bytes())
    place = content.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8
    assert struct.unpack_from("<I", content, place) == (0,)
    struct.pack_into("<I", content, place, number)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"of kind {name}.*: output_norm\.weight"):
        gguf_header.read(file)


def test_a_cut_file_is_never_read(tmp_path: Path) -> None:
    file = small(tmp_path)
    whole = file.read_bytes()
    end = max(tensor.start + tensor.nbytes for tensor in gguf_header.read(file).tensors.values())
    for length in [*range(0, end, 7), end - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"x\.gguf is no whole GGUF file"):
            gguf_header.read(file)


def test_a_damaged_header_is_refused_in_words_or_read(tmp_path: Path) -> None:
    """Whatever the bytes, no other error comes out."""
    file = small(tmp_path)
    whole, dice = file.read_bytes(), random.Random(1)
    start = min(tensor.start for tensor in gguf_header.read(file).tensors.values())
    refused = 0
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            content[dice.randrange(4, start)] = dice.randrange(256)
        file.write_bytes(content)
        try:
            gguf_header.read(file)
        except CheckpointError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1", "a git-lfs pointer"),
        (b"PK\x03\x04", "does not begin with 'GGUF'"),
        (b"", "does not begin with 'GGUF'"),
    ],
)
def test_what_is_no_gguf_file_is_named(tmp_path: Path, start: bytes, what: str) -> None:
    (tmp_path / "x.gguf").write_bytes(start)
    with pytest.raises(CheckpointError, match=f"is no whole GGUF file: .*{what}"):
        gguf_header.read(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("version", "why"),
    [
        (b"\x01\0\0\0", "of version 1"),
        (b"\x04\0\0\0", "of version 4"),
        (b"\0\0\0\x03", "byte order"),
    ],
)
def test_other_versions_are_named(tmp_path: Path, version: bytes, why: str) -> None:
    file = small(tmp_path)
    file.write_bytes(b"GGUF" + version + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match=why):
        gguf_header.read(file)


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    file = small(tmp_path)
    file.write_bytes(file.read_bytes().replace(b"llama.offset", b"llama.widths"))
    with pytest.raises(CheckpointError, match=r"the key llama\.widths a second time"):
        gguf_header.read(file)


@pytest.mark.parametrize("name", list(TENSORS))
def test_a_tensor_that_does_not_follow_the_one_before_is_refused(tmp_path: Path, name: str) -> None:
    """Two of them at one place would both be read from there."""
    file = small(tmp_path)
    content = bytearray(file.read_bytes())
    place = content.index(name.encode()) + len(name)
    place += 4 + 8 * TENSORS[name].ndim + 4  # dimensions, and the kind
    (offset,) = struct.unpack_from("<Q", content, place)
    struct.pack_into("<Q", content, place, offset ^ 32)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"no whole GGUF file: the tensor {name} of shape"):
        gguf_header.read(file)


def test_another_alignment_is_used(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_custom_alignment(128)
    for name, array in TENSORS.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = gguf_header.read(tmp_path / "x.gguf")
    assert all(tensor.start % 128 == 0 for tensor in header.tensors.values())
    assert all(np.array_equal(header.array(name), array) for name, array in TENSORS.items())


# ---------------------------------------------------------------------------------------------
# Files that were split.
# ---------------------------------------------------------------------------------------------


def parts(folder: Path) -> list[Path]:
    """Write a small file in three parts, one tensor in each."""
    small(folder, per_part=1)
    return sorted(folder.glob("x-*.gguf"))


def test_parts_are_read_as_one(tmp_path: Path) -> None:
    files = parts(tmp_path)
    assert [file.name for file in files] == [f"x-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    header = gguf_header.read(files[0])
    assert header.parts == tuple(files)
    assert {**header.keys, **KEYS, "tokenizer.ggml.tokens": 3} == header.keys
    assert all(np.array_equal(header.array(name), array) for name, array in TENSORS.items())
    assert gguf_header.siblings(files[0].name) == "x-?????-of-00003.gguf"
    assert gguf_header.siblings("model.gguf") == "model.gguf"


def test_what_is_wrong_with_parts_is_named(tmp_path: Path) -> None:
    first, second, third = parts(tmp_path)

    def refused(file: Path) -> str:
        with pytest.raises(CheckpointError) as error:
            gguf_header.read(file)
        return str(error.value)

    said = refused(second)
    assert "is part 2 of 3 of a model that was split" in said
    assert "load.file=x-00001-of-00003.gguf" in said
    alone = tmp_path / "renamed.gguf"
    alone.write_bytes(first.read_bytes())
    assert "is part 1 of 3 of a model that was split" in refused(alone)
    third.write_bytes(second.read_bytes())
    assert "x-00003-of-00003.gguf is not part 3 of 3" in refused(first)
    third.unlink()
    assert "missing: 1 of the 3 parts of x-00001-of-00003.gguf: x-00003" in refused(first)
    table = TENSORS["token_embd.weight"]
    write_file(
        third,
        "llama",
        {"split.no": 2, "split.count": 3},
        {"more.weight": table, "other.weight": table},
    )
    assert "the 3 parts hold 4 tensors, and their header says 3" in refused(first)


def test_parts_that_repeat_a_tensor_are_refused(tmp_path: Path) -> None:
    first, _, third = parts(tmp_path)
    again = {"output_norm.weight": TENSORS["output_norm.weight"]}
    write_file(third, "llama", {"split.no": 2, "split.count": 3}, again)
    with pytest.raises(CheckpointError, match=r"x-00003.* repeats tensors: output_norm\.weight"):
        gguf_header.read(first)
