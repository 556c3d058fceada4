"""A safetensors header that cannot be true is refused, a true one is read as torch wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.loading.safetensors_header import read_header
from tests.models import safetensors_file
from tests.refusal import refusal


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        ([], "not a JSON object"),
        ({"w": 1}, "no valid data_offsets for tensor w"),
        ({"w": {"dtype": "F32", "shape": [1]}}, "no valid data_offsets for tensor w"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, "no valid data_offsets"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, -4]}}, "no valid data_offsets"),
        ({"w": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, "unknown dtype F31"),
        ({"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, "unknown dtype"),
        ({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "impossible shape [-1]"),
        ({"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "impossible shape"),
        ({"w": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, "12 bits"),
        (
            {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
            "4 bytes; F32 of shape [2] has 8",
        ),
        (
            {"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
            "at byte 4 of its data, expected at 0",
        ),
        (
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "w": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
            },
            "tensor w at byte 2 of its data, expected at 4",
        ),
    ],
)
def test_header_that_cannot_be_true(tmp_path: Path, header: Any, says: str) -> None:
    message = refusal(read_header, safetensors_file(tmp_path, header, b"\0" * 8))
    assert says in message
    assert "model.safetensors" in message


def test_every_dtype_that_torch_can_save(tmp_path: Path) -> None:
    names = "int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool float64 float32 float16 "
    names += "bfloat16 complex64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz "
    names += "float8_e8m0fnu"
    dtypes = [getattr(torch, name) for name in names.split()]
    saved = {str(dtype): torch.zeros(3, 2, dtype=torch.uint8).to(dtype) for dtype in dtypes}
    save_file(saved, tmp_path / "all.safetensors")
    header = read_header(tmp_path / "all.safetensors")
    assert header.keys() == saved.keys()
    for name, tensor in saved.items():
        assert header[name].nbytes == tensor.nbytes, name
        assert header[name].shape == (3, 2)


def test_packed_and_empty_tensors(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]},
        "fours": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]},
        "sixes": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [2, 5]},
    }
    found = read_header(safetensors_file(tmp_path, header, b"\0" * 5))
    assert {name: info.nbytes for name, info in found.items()} == {
        "empty": 0,
        "fours": 2,
        "sixes": 3,
    }


def test_file_that_is_not_there(tmp_path: Path) -> None:
    assert "gone.safetensors cannot be read" in refusal(read_header, tmp_path / "gone.safetensors")
