"""Broken checkpoints are refused before they generate, by whoever runs them: exit 3, with numbers.

The faults are those that stock transformers 5.23 loads from, or fails at late or unclearly. What
each message says is tested in tests/engine/test_checkpoint.py; here they go through everything.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine
from engine.errors import CheckpointError, RuntimeFailure
from tests.conftest import Run
from tests.models import tiny_model

TENSOR = "model.layers.1.mlp.up_proj.weight"


def _weights(folder: Path) -> Path:
    """Return the file that holds `TENSOR`."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return folder / "model.safetensors"
    return folder / str(json.loads(index.read_text())["weight_map"][TENSOR])


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = _weights(folder)
        file.write_bytes(change(file.read_bytes()))

    return spoil


def _tensor(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = load_file(_weights(folder))
        changed = change(content.pop(TENSOR).clone())
        save_file(content | ({} if changed is None else {TENSOR: changed}), _weights(folder))
        index = folder / "model.safetensors.index.json"
        if changed is None and index.exists():
            listed = json.loads(index.read_text())
            del listed["weight_map"][TENSOR]
            index.write_text(json.dumps(listed))

    return spoil


def _value(value: float) -> Callable[[Path], None]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] = value
        return tensor

    return _tensor(change)


def _config(**values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return spoil


def _flip_a_bit(folder: Path) -> None:
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in folder.glob("*.safetensors")
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))
    _bytes(lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])(folder)


def _only_pickle(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def _not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{'model_type': llama}")


def _larger_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["brand", "new"])
    tokenizer.save_pretrained(folder)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated body": (_bytes(lambda data: data[:-1000]), r"[\d,]+ bytes"),
    "truncated header": (_bytes(lambda data: data[:60]), r"\d+ bytes"),
    "empty": (_bytes(lambda data: b""), "0 bytes"),
    "trailing bytes": (_bytes(lambda data: data + b"\0" * 7), r"[\d,]+ bytes"),
    "absurd header": (_bytes(lambda data: struct.pack("<Q", 1 << 62) + data[8:]), r"\d{4,}"),
    "git-lfs pointer": (
        _bytes(lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "git lfs pull",
    ),
    "HTML page": (_bytes(lambda data: b"<!DOCTYPE html><html>log in</html>"), "HTML"),
    "bit flip": (_flip_a_bit, "[0-9a-f]{8}"),
    "NaN": (_value(float("nan")), "1 NaN"),
    "Inf": (_value(float("inf")), "1 Inf"),
    "missing tensor": (_tensor(lambda tensor: None), re.escape(TENSOR)),
    "one layer more": (_config(num_hidden_layers=3), "9 tensors"),
    "wrong shape": (_tensor(lambda tensor: tensor[:-1].clone()), r"127.*128|128.*127"),
    "missing file": (lambda folder: _weights(folder).unlink(), "safetensors"),
    "only pickle": (_only_pickle, "pickle"),
    "config is not JSON": (_not_json, "not JSON"),
    "tokenizer is larger": (_larger_tokenizer, "32[0-9]"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        layout: tiny_model("llama", tmp_path_factory.mktemp(layout), max_shard_size=size)
        for layout, size in {"single": "50GB", "sharded": "100KB"}.items()
    }


@pytest.fixture(params=["single", "sharded"])
def folder(request: pytest.FixtureRequest, sound: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound[request.param], tmp_path / "model"))


def test_the_sound_ones_build(folder: Path) -> None:
    with engine.build(engine.compose("base", [f"model.path={folder}"])) as session:
        assert session.receipts


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_is_refused(fault: str, folder: Path) -> None:
    spoil, says = FAULTS[fault]
    spoil(folder)
    with pytest.raises(CheckpointError, match=rf"(?s){says}") as caught:
        engine.build(engine.compose("base", [f"model.path={folder}"]))
    assert all(problem.hint for problem in caught.value.problems), "what to do about it"


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize("fault", ["NaN", "missing tensor", "wrong shape", "one layer more"])
def test_quantizing_hides_no_fault(fault: str, quantize: str, folder: Path) -> None:
    FAULTS[fault][0](folder)
    words = [f"model.path={folder}", f"quantize={quantize}"]
    with pytest.raises(CheckpointError):
        engine.build(engine.compose("base", words))


@pytest.mark.parametrize("fault", ["truncated body", "NaN", "missing tensor", "only pickle"])
def test_the_command_exits_3(
    fault: str, sound: dict[str, Path], engine: Run, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sound["single"], tmp_path / "model"))
    spoil, says = FAULTS[fault]
    spoil(folder)
    done = engine("run", "base", f"model.path={folder}", "-p", "x")
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    assert re.search(says, done.stderr, re.DOTALL)
    assert "Traceback" not in done.stderr


def test_a_prompt_beyond_the_context_is_no_silent_garbage(sound: dict[str, Path]) -> None:
    with engine.build(engine.compose("base", [f"model.path={sound['single']}"])) as session:
        with pytest.raises(RuntimeFailure, match=r"\d+ tokens.*128"):
            session.generate("x" * 200)
        assert session.generate("x").token_ids, "the session goes on"
