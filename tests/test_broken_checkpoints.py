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
from engine import verdict
from engine.errors import CheckpointError, RecipeError, RuntimeFailure
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


def _generation(values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "generation_config.json").write_text(json.dumps(values))

    return spoil


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


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
    "one layer more": (_config(num_hidden_layers=3), "3 layers, the weights have 2"),
    "one layer less": (_config(num_hidden_layers=1), "1 layers, the weights have 2"),
    "a billion layers": (_config(num_hidden_layers=10**9), "1000000000.*no model has more than"),
    "int8 weights": (_tensor(lambda tensor: tensor.to(torch.int8)), rf"{TENSOR} is I8.*BF16"),
    "boolean weights": (_tensor(lambda tensor: tensor > 0), rf"{TENSOR} is BOOL"),
    "float8 weights": (_tensor(lambda tensor: tensor.to(torch.float8_e4m3fn)), "is F8_E4M3"),
    "complex weights": (_tensor(lambda tensor: tensor.to(torch.complex64)), "is C64"),
    "packed by nobody": (
        _config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"packed by bitsandbytes.*config\.json",
    ),
    "packed by nonsense": (
        _config(quantization_config={"quant_method": "nonsense"}),
        r"quant_method=nonsense.*config\.json",
    ),
    "negative rope": (_config(rope_parameters={"rope_theta": -5}), r"rope_theta.*-5.*config\.json"),
    "rope of text": (_config(rope_parameters={"rope_theta": "a"}), "rope_theta must be.*'a'"),
    "nested ends": (_generation({"eos_token_id": [[1], [2]]}), r"generation_config\.json: eos_tok"),
    "end of text": (
        _generation({"eos_token_id": "x"}),
        r"generation_config\.json: eos_token_id='x'",
    ),
    "pad beyond": (_generation({"pad_token_id": 100000}), "pad_token_id=100000 is no token"),
    "a list of settings": (_generation([1]), r"generation_config\.json is not a JSON object"),
    "wrong shape": (_tensor(lambda tensor: tensor[:-1].clone()), r"127.*128|128.*127"),
    "missing file": (lambda folder: _weights(folder).unlink(), "safetensors"),
    "only pickle": (_only_pickle, "pickle"),
    "config is not JSON": (_not_json, "not JSON"),
    "an adapter beside": (_adapter, r"adapter of peft \(LORA\).*beside a whole model"),
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


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"hidden_act": "banana"}, "hidden_act=banana from config.json"),
        ({"rope_parameters": {"rope_type": "banana"}}, "rope_type=banana"),
        ({"auto_map": {"AutoConfig": "x.Y"}, "model_type": "unheard"}, "unheard"),
    ],
)
@pytest.mark.parametrize("load", ["transformers", "random"])
def test_a_refused_value_is_named_and_code_is_hinted_at_only_where_there_is_some(
    values: dict[str, Any], says: str, load: str, sound: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sound["single"], tmp_path / "model"))
    _config(**values)(folder)
    with pytest.raises((CheckpointError, RecipeError), match=says) as caught:
        engine.build(engine.compose("base", [f"model.path={folder}", f"load={load}"]))
    hinted = any("trust_remote_code" in problem.hint for problem in caught.value.problems)
    assert hinted == ("auto_map" in values)


@pytest.mark.parametrize(
    "spoil",
    [
        _generation({"num_return_sequences": 3, "eos_token_id": 2}),
        _generation({"watermarking_config": {"a": 3}, "pad_token_id": -1}),
        _config(return_dict=False),
    ],
)
def test_settings_that_nothing_uses_stop_nothing(
    spoil: Callable[[Path], None], sound: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sound["single"], tmp_path / "model"))
    spoil(folder)
    with engine.build(engine.compose("base", [f"model.path={folder}"])) as session:
        assert session.generate("x").token_ids


@pytest.mark.parametrize("factor", [1, 3])
def test_a_tensor_in_two_shards(factor: int, sound: dict[str, Path], tmp_path: Path) -> None:
    """transformers takes whichever comes last; the same twice is no harm."""
    folder = Path(shutil.copytree(sound["sharded"], tmp_path / "model"))
    other = next(file for file in folder.glob("*.safetensors") if file != _weights(folder))
    twice = load_file(other) | {TENSOR: load_file(_weights(folder))[TENSOR] * factor}
    save_file(twice, other, metadata={"format": "pt"})
    recipe = engine.compose("base", [f"model.path={folder}"])
    if factor == 1:
        with engine.build(recipe) as session:
            assert session.generate("x").token_ids
        return
    with pytest.raises(CheckpointError, match=rf"different values: {TENSOR} \(in model-.* and "):
        verdict.check(recipe).raise_for_problems()


@pytest.mark.parametrize("fault", ["one layer more", "packed by nobody", "negative rope"])
def test_check_tells_what_config_and_headers_tell(fault: str, folder: Path) -> None:
    FAULTS[fault][0](folder)
    with pytest.raises(CheckpointError, match=rf"(?s){FAULTS[fault][1]}"):
        verdict.check(engine.compose("base", [f"model.path={folder}"])).raise_for_problems()


def test_without_docstrings_the_reason_is_told(
    sound: dict[str, Path], engine: Run, tmp_path: Path
) -> None:
    words = ("run", "base", f"model.path={sound['single']}", "-p", "x")
    done = engine(*words, env={"PYTHONOPTIMIZE": "2"})
    assert done.returncode == 3, done.stderr
    assert "needs docstrings" in done.stderr
    assert "PYTHONOPTIMIZE=1" in done.stderr


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
