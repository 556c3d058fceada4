"""What a saved conversation was made with: resumed with anything else, it is refused or right."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from engine.caching import cache_file, fingerprint
from engine.errors import CheckpointError, RecipeError
from tests.conftest import Build
from tests.test_cache_file import WORDS, ModelFolder, saved, say


def _packed(folder: Path, source: Path, config: Any) -> Path:
    auto: Any = AutoModelForCausalLM
    auto.from_pretrained(source, quantization_config=config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("packing", ["none", "int8", "nf4", "torchao"])
def test_every_byte_of_a_checkpoint_is_in_the_digest(
    model: ModelFolder, tmp_path: Path, packing: str
) -> None:
    """One number of one tensor, a row of an embedding, a scale: another model, another cache."""
    bitsandbytes: Any = BitsAndBytesConfig
    configs: dict[str, Any] = {
        "int8": lambda: bitsandbytes(load_in_8bit=True),
        "nf4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_use_double_quant=True),
        "torchao": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    }
    make = configs.get(packing)
    source = tmp_path / "source"
    if make is None:
        shutil.copytree(model("llama"), source)
    else:
        _packed(source, model("llama"), make())
    before = _digest(source)
    assert before == _digest(source)
    content = load_file(source / "model.safetensors")
    kinds: dict[str, str] = {}  # one tensor of each kind: loading takes its time
    for name in content:
        kinds[re.sub(r"^.*layers\.\d+\.(self_attn|mlp)\.\w+\.", "", name)] = name
    assert len(kinds) > 5
    for kind, name in kinds.items():
        if "quant_state" in kind or kind == "weight_format":
            continue  # no numbers: how the others are to be read
        _flip(source / "model.safetensors", name)
        assert _digest(source) != before, name
        _flip(source / "model.safetensors", name)
    assert _digest(source) == before


def _digest(folder: Path) -> str:
    auto: Any = AutoModelForCausalLM
    return fingerprint.weights(auto.from_pretrained(folder))


def _flip(file: Path, name: str) -> None:
    """Flip the last bit of the number in the middle of a tensor."""
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    entry = json.loads(data[8 : 8 + length])[name]
    begin, end = entry["data_offsets"]
    size = max(1, (end - begin) // max(1, math.prod(entry["shape"])))
    data[8 + length + begin + (end - begin) // size // 2 * size] ^= 1
    file.write_bytes(data)


def test_offloaded_weights_are_in_the_digest(model: ModelFolder, tmp_path: Path) -> None:
    auto: Any = AutoModelForCausalLM
    parts = ["embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb"]
    places = {"lm_head": "cpu"} | {f"model.{part}": "cpu" for part in parts}
    places["model.layers.1"] = "disk"
    found = []
    for number in range(2):
        source = shutil.copytree(model("llama"), tmp_path / f"source{number}")
        if number:
            _flip(source / "model.safetensors", "model.layers.1.mlp.up_proj.weight")
        spread = auto.from_pretrained(source, device_map=places, offload_folder=tmp_path / "off")
        assert any(each.is_meta for each in spread.parameters())
        found.append(fingerprint.weights(spread))
    assert found[0] != found[1]
    assert found[0] == _digest(model("llama"))


def _merges_cut(told: dict[str, Any]) -> None:
    told["model"]["merges"] = told["model"]["merges"][:5]


def _tokens_swapped(told: dict[str, Any]) -> None:
    words = told["model"]["vocab"]
    first, second = (word for word in words if words[word] in (100, 101))
    words[first], words[second] = words[second], words[first]


def _lower_case(told: dict[str, Any]) -> None:
    told["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize("change", [_merges_cut, _tokens_swapped, _lower_case])
def test_another_tokenizer_is_refused(
    build: Build, model: ModelFolder, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    """The saved ids would mean other words, or other ids the same."""
    saved(build(*WORDS), tmp_path / "talk.safetensors")
    folder = Path(shutil.copytree(model("llama"), tmp_path / "model"))
    told = json.loads((folder / "tokenizer.json").read_text())
    change(told)
    (folder / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(RecipeError, match="the model's tokenizer"):
        build(*WORDS, f"model.path={folder}").chat(resume=tmp_path / "talk.safetensors")


def test_batches_before_change_no_tokenizer(build: Build, tmp_path: Path) -> None:
    """Padding and truncation are settings of a call that a fast tokenizer keeps."""
    saved(build(*WORDS), tmp_path / "talk.safetensors")
    other = build(*WORDS)
    other.tokenizer(["a", "longer"], padding=True, truncation=True, max_length=8)
    say(other.chat(resume=tmp_path / "talk.safetensors"), "go on")


def test_another_chat_template_renders_all_anew(
    build: Build, model: ModelFolder, tmp_path: Path
) -> None:
    session = build(*WORDS)
    messages = saved(session, tmp_path / "talk.safetensors").messages
    other = build(*WORDS)
    template = str(other.tokenizer.chat_template)
    other.tokenizer.chat_template = template.replace("<s>{{", "<s>Said {{")
    resumed: Any = other.chat(resume=tmp_path / "talk.safetensors")
    fresh: Any = other.chat()
    fresh.messages = list(messages)
    assert say(resumed, "go on") == say(fresh, "go on")


def test_a_prefix_is_not_lost(build: Build, tmp_path: Path) -> None:
    file = tmp_path / "talk.safetensors"
    saved(build(*WORDS, "task.prefix=Be brief."), file)
    say(build(*WORDS, "task.prefix=Be brief.").chat(resume=file), "go on")
    say(build(*WORDS).chat(resume=file), "it began with one")
    with pytest.raises(RecipeError, match=r"began with 'Be brief\.'"):
        build(*WORDS, "task.prefix=Be long.").chat(resume=file)
    saved(build(*WORDS), file)
    with pytest.raises(RecipeError, match="began without one"):
        build(*WORDS, "task.prefix=Be brief.").chat(resume=file)


def test_files_of_the_former_format_are_refused(build: Build, tmp_path: Path) -> None:
    """They say nothing of the tokenizer, and know a few numbers of each tensor."""
    file = tmp_path / "talk.safetensors"
    session = build(*WORDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_file, "FORMAT", cache_file.FORMAT - 1)
        saved(session, file)
    with pytest.raises(CheckpointError, match="has format 1, and this engine reads 2"):
        session.chat(resume=file)
