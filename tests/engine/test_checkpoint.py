"""Every fault that stock transformers loads from, or explains badly, is refused with numbers."""

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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from engine.errors import CheckpointError
from engine.loading import checkpoint
from engine.loading.checkpoint import (
    read_config,
    read_header,
    tensors,
    verify_checksums,
    verify_finite,
    verify_loaded,
    verify_tokenizer,
)
from tests.models import FAMILIES, VOCABULARY, safetensors_file, tiny_model, tiny_tokenizer
from tests.refusal import refusal

LAYOUTS = ("single", "sharded")
FLOATS = [
    *("float64", "float32", "float16", "bfloat16", "complex64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    sizes = {"single": "50GB", "sharded": "100KB"}
    return {
        layout: tiny_model("llama", tmp_path_factory.mktemp(layout), max_shard_size=size)
        for layout, size in sizes.items()
    }


@pytest.fixture(params=LAYOUTS)
def folder(request: pytest.FixtureRequest, pristine: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine[request.param], tmp_path / "model"))


@pytest.fixture
def sharded(pristine: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine["sharded"], tmp_path / "sharded"))


def weights(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


def holder(folder: Path, name: str) -> Path:
    return tensors(folder)[name].file


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def rewrite(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Change a tensor, or drop it; in the index as well, as another tool would."""
    file = holder(folder, name)
    content = load_file(file)
    changed = change(content.pop(name).clone())
    if changed is not None:
        content[name] = changed
    save_file(content, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if changed is None and index.exists():
        parsed = json.loads(index.read_text())
        del parsed["weight_map"][name]
        index.write_text(json.dumps(parsed))


def load(folder: Path) -> None:
    """Load as the `load` plugin does."""
    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(
        folder,
        config=AutoConfig.from_pretrained(folder),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    verify_loaded(folder, info, model=model)


# --- files that are not what they should be ------------------------------------------------------


def test_a_sound_checkpoint_passes_everything(folder: Path) -> None:
    found = tensors(folder)
    assert found["model.embed_tokens.weight"].dtype == "F32"
    assert found["model.embed_tokens.weight"].shape == (VOCABULARY, 64)
    assert found["model.embed_tokens.weight"].nbytes == VOCABULARY * 64 * 4
    assert read_config(folder)["model_type"] == "llama"
    assert verify_checksums(folder) == 0
    verify_finite(folder)
    load(folder)


def test_truncated_body(folder: Path) -> None:
    file = weights(folder)
    promised = sum(info.nbytes for info in read_header(file).values())
    file.write_bytes(file.read_bytes()[:-1000])
    message = refusal(tensors, folder)
    assert file.name in message
    assert "1000 bytes too short" in message
    assert f"expected {promised} bytes of tensors, there are {promised - 1000}" in message
    assert "interrupted download" in message


def test_truncated_header(folder: Path) -> None:
    file = weights(folder)
    needed = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
    file.write_bytes(file.read_bytes()[:100])
    message = refusal(tensors, folder)
    assert file.name in message
    assert f"ends within its header: expected {needed} bytes, there are 100" in message
    assert "interrupted download" in message


@pytest.mark.parametrize(("size", "says"), [(0, "is empty (0 bytes)"), (5, "has 5 bytes")])
def test_empty(folder: Path, size: int, says: str) -> None:
    weights(folder).write_bytes(b"\0" * size)
    message = refusal(tensors, folder)
    assert weights(folder).name in message
    assert says in message


def test_trailing_bytes(folder: Path) -> None:
    with weights(folder).open("ab") as stream:
        stream.write(b"\0" * 17)
    message = refusal(tensors, folder)
    assert weights(folder).name in message
    assert "17 trailing bytes" in message
    assert "appended" in message


def test_header_of_absurd_length(folder: Path) -> None:
    file = weights(folder)
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])
    message = refusal(tensors, folder)
    assert file.name in message
    assert str(2**62) in message
    assert "100000000" in message


def test_git_lfs_pointer(folder: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4096\n"
    weights(folder).write_bytes(pointer)
    message = refusal(tensors, folder)
    assert f"{weights(folder).name} is a git-lfs pointer" in message
    assert f"({len(pointer)} bytes)" in message
    assert "git lfs pull" in message


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>", b"\n<html><body>Log in</body></html>"])
def test_html_page(folder: Path, page: bytes) -> None:
    weights(folder).write_bytes(page)
    message = refusal(tensors, folder)
    assert f"{weights(folder).name} is an HTML page" in message
    assert "login page" in message


def test_missing_shard_is_told_before_anything_is_read(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = sorted(file.name for file in sharded.glob("*.safetensors"))
    for name in shards[:2]:
        (sharded / name).unlink()
    monkeypatch.setattr(checkpoint, "read_header", lambda file: pytest.fail("was read"))
    message = refusal(tensors, sharded)
    assert f"missing: 2 of {len(shards)} shards: {shards[0]}, {shards[1]}" in message
    assert "fetch" in message


def edit_index(sharded: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/outside.safetensors", "..\\outside.safetensors", 7]
)
def test_index_that_escapes_the_folder(sharded: Path, shard: object) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"lm_head.weight": shard}))
    outside = sharded.parent / "outside.safetensors"
    shutil.copy(weights(sharded), outside)
    message = refusal(tensors, sharded)
    assert f"maps lm_head.weight to {shard}" in message


def test_index_that_names_a_pickle(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"lm_head.weight": "a.bin"}))
    assert "maps lm_head.weight to a.bin" in refusal(tensors, sharded)


def test_index_that_names_a_tensor_its_shard_lacks(sharded: Path) -> None:
    name = weights(sharded).name
    edit_index(sharded, lambda index: index["weight_map"].update({"model.extra": name}))
    message = refusal(tensors, sharded)
    assert "1 tensor that model.safetensors.index.json promises" in message
    assert f"model.extra (not in {name})" in message


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_malformed_index(sharded: Path, content: str) -> None:
    edit_index(sharded, lambda index: None)
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        tensors(sharded)


def test_only_pickle(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    torch.save({"w": torch.zeros(1)}, folder / "pytorch_model.bin")
    message = refusal(tensors, folder)
    assert "pytorch_model.bin" in message
    assert "load.allow_pickle=true" in message
    assert "save_pretrained" in message
    assert tensors(folder, allow_pickle=True) == {}


def test_pickle_beside_safetensors_is_left_alone(folder: Path) -> None:
    torch.save({"w": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert "w" not in tensors(folder)


def test_no_weights_at_all(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    message = refusal(tensors, folder)
    assert "no weights" in message
    assert "config.json" in message


# --- config.json ---------------------------------------------------------------------------------


def test_config_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    message = refusal(read_config, folder)
    assert "config.json cannot be read" in message
    assert "there is: chat_template.jinja" in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{\n  "model_type": "llama",\n  oops\n}', "line 3"),
        ("<html></html>", "HTML page"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("", "not JSON"),
    ],
)
def test_config_that_is_not_json(folder: Path, content: str, says: str) -> None:
    (folder / "config.json").write_text(content)
    message = refusal(read_config, folder)
    assert "config.json" in message
    assert says in message


def test_config_that_describes_no_model(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="not a JSON object but list"):
        read_config(folder)
    (folder / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(CheckpointError, match="neither model_type nor architectures"):
        read_config(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"_attn_implementation_internal": "someone/kernel"},
        {"_attn_implementation": "someone/kernel@v1:forward"},
        {"attn_implementation": {"text_config": "someone/kernel"}},
        {"_experts_implementation": "someone/kernel"},
        {"text_config": {"_attn_implementation": "someone/kernel"}},
        {"parts": [{"_experts_implementation_internal": "someone/kernel"}]},
    ],
)
def test_config_that_asks_for_code(folder: Path, values: dict[str, Any]) -> None:
    edit_config(folder, **values)
    message = refusal(read_config, folder)
    assert "someone/kernel" in message
    assert "attention=sdpa" in message


def test_config_may_name_an_implementation_of_transformers(folder: Path) -> None:
    edit_config(folder, _attn_implementation="sdpa")
    assert read_config(folder)["_attn_implementation"] == "sdpa"


# --- bytes ---------------------------------------------------------------------------------------


def write_manifest(folder: Path) -> int:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in files]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    return len(files)


def test_bit_flip(folder: Path) -> None:
    count = write_manifest(folder)
    assert verify_checksums(folder) == count
    file = weights(folder)
    content = bytearray(file.read_bytes())
    before = hashlib.sha256(content).hexdigest()
    content[-1] ^= 1
    file.write_bytes(content)
    tensors(folder)  # the header is still true
    message = refusal(verify_checksums, folder)
    assert file.name in message
    assert before[:12] in message
    assert hashlib.sha256(content).hexdigest()[:12] in message
    assert "bit flip" in message


def test_capital_letters_are_the_same_checksums(folder: Path) -> None:
    count = write_manifest(folder)
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    upper = [line[:64].upper() + line[64:] for line in lines]
    (folder / "SHA256SUMS").write_text("\n".join(upper) + "\n")
    assert verify_checksums(folder) == count


def test_checksum_of_a_missing_file(folder: Path) -> None:
    write_manifest(folder)
    (folder / "tokenizer.json").unlink()
    message = refusal(verify_checksums, folder)
    assert "tokenizer.json" in message
    assert "no such file" in message


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..\\secret"])
def test_checksums_stay_in_the_folder(folder: Path, name: str) -> None:
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    assert "outside of the folder" in refusal(verify_checksums, folder)


def test_checksums_in_another_format(folder: Path) -> None:
    (folder / "SHA256SUMS").write_text("model.safetensors: abc\n")
    with pytest.raises(CheckpointError, match=r"does not write: model\.safetensors: abc"):
        verify_checksums(folder)


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "says"),
    [([float("nan")], "1 NaN and 0 Inf of 64"), ([float("inf"), -float("inf")], "0 NaN and 2 Inf")],
)
def test_values_that_are_not_finite(folder: Path, values: list[float], says: str) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[: len(values)] = torch.tensor(values)
        return tensor

    rewrite(folder, "model.norm.weight", spoil)
    message = refusal(verify_finite, folder)
    assert "1 tensor with values that are not finite: model.norm.weight" in message
    assert says in message
    assert "another checkpoint" in message
    verify_finite(folder, ["lm_head.weight"])
    assert "model.norm.weight" in refusal(verify_finite, folder, ["model.norm.weight"])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("position", [0, 2500, 4998])
def test_one_bad_value_is_found_in_every_dtype(tmp_path: Path, dtype: str, position: int) -> None:
    values = torch.ones(4999)
    save_file({"w": values.to(getattr(torch, dtype))}, tmp_path / "model.safetensors")
    verify_finite(tmp_path)
    values[position] = float("nan")
    save_file({"w": values.to(getattr(torch, dtype))}, tmp_path / "model.safetensors")
    assert "w (1 NaN and 0 Inf of" in refusal(verify_finite, tmp_path)


def test_large_finite_values_are_fine(tmp_path: Path) -> None:
    largest = {
        str(dtype): torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float8_e5m2)
    }
    save_file(largest, tmp_path / "model.safetensors")
    verify_finite(tmp_path)


def test_integers_and_packed_floats_are_not_looked_into(tmp_path: Path) -> None:
    header = {
        "codes": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
        "fours": {"dtype": "F4", "shape": [4], "data_offsets": [2, 4]},
        "empty": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]},
    }
    safetensors_file(tmp_path, header, b"\xff" * 4)
    verify_finite(tmp_path)


def test_five_bad_tensors_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    bad = {f"w{number}": torch.tensor([float("nan")]) for number in range(8)}
    save_file(bad, tmp_path / "model.safetensors")
    message = refusal(verify_finite, tmp_path)
    assert "8 tensors" in message
    assert len(re.findall(r"w\d \(", message)) == 5
    assert "and 3 more" in message


# --- what transformers makes of it ---------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_saved_and_loaded_passes(family: str, tmp_path: Path) -> None:
    load(tiny_model(family, tmp_path))


def test_missing_tensor(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, name, lambda tensor: None)
    message = refusal(load, folder)
    assert "1 tensor missing from the checkpoint that the config promises" in message
    assert f"(LlamaForCausalLM has 21): {name}" in message
    assert "weights are missing or renamed" in message


def test_missing_tied_embedding(tmp_path: Path) -> None:
    tiny_model("gpt2", tmp_path)
    rewrite(tmp_path, "transformer.wte.weight", lambda tensor: None)
    assert "transformer.wte.weight" in refusal(load, tmp_path)


def test_masks_of_old_checkpoints_may_stay(tmp_path: Path) -> None:
    tiny_model("gpt2", tmp_path)
    content = load_file(tmp_path / "model.safetensors")
    for name in ("attn.bias", "attn.attention.bias"):
        content[f"transformer.h.0.{name}"] = torch.ones(1, 1, 8, 8)
    content["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(content, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load(tmp_path)


def test_config_with_one_layer_more(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    message = refusal(load, folder)
    assert "9 tensors missing from the checkpoint" in message
    assert "model.layers.2." in message
    assert "and 4 more" in message
    assert "config.json has more layers than the weights" in message


def test_config_with_one_layer_less(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)
    message = refusal(load, folder)
    assert "9 tensors of the checkpoint without a place in LlamaForCausalLM" in message
    assert "model.layers.1." in message
    assert "config.json has fewer layers than the weights" in message


def test_wrong_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=96)
    message = refusal(load, folder)
    assert "6 tensors with another shape than the config says" in message
    assert "has shape [64, 128] in the checkpoint and [64, 96] in the model" in message
    assert "another model's" in message


def test_differences_that_the_caller_expects(folder: Path) -> None:
    info = {
        "missing_keys": {"a.bias", "b.bias"},
        "unexpected_keys": {"mtp.head"},
        "mismatched_keys": set(),
        "error_msgs": [],
    }
    model: Any = torch.nn.Linear(1, 1)
    verify_loaded(
        folder, info, model=model, expected_missing=["*.bias"], expected_unexpected=["mtp.head"]
    )
    message = refusal(verify_loaded, folder, info, model=model, expected_missing=["a.bias"])
    assert "b.bias" in message
    assert "a.bias" not in message
    assert "mtp.head" in message


def test_messages_of_the_loader_are_passed_on(folder: Path) -> None:
    empty: dict[str, Any] = dict.fromkeys(
        ["missing_keys", "unexpected_keys", "mismatched_keys"], ()
    )
    model: Any = torch.nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match="1 tensor that could not be loaded: odd strides"):
        verify_loaded(folder, {**empty, "error_msgs": ["odd strides"]}, model=model)


# --- the tokenizer -------------------------------------------------------------------------------


def test_tokenizer_that_fits_exactly(folder: Path) -> None:
    verify_tokenizer(AutoTokenizer.from_pretrained(folder), VOCABULARY)


def test_tokenizer_larger_than_the_embedding() -> None:
    with pytest.raises(CheckpointError, match=r"largest id is 319 .* has 300 rows") as caught:
        verify_tokenizer(tiny_tokenizer(), 300)
    assert "another model's" in caught.value.problems[0].hint


@pytest.mark.parametrize(
    "added",
    [
        {"pad_token": "[PAD]"},
        {"additional_special_tokens": ["<|im_start|>"]},
    ],
)
def test_token_that_was_added_without_resizing(added: dict[str, Any]) -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_special_tokens(added)
    tokenizer.chat_template = "<|im_start|>{{ messages }}"
    with pytest.raises(CheckpointError, match=rf"largest id is {VOCABULARY} .* {VOCABULARY} rows"):
        verify_tokenizer(tokenizer, VOCABULARY)


def test_placeholder_of_another_modality_may_lie_beyond() -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    verify_tokenizer(tokenizer, VOCABULARY)
    tokenizer.add_tokens(["ordinary"])
    with pytest.raises(CheckpointError, match=f"{VOCABULARY + 1} .ordinary."):
        verify_tokenizer(tokenizer, VOCABULARY)
