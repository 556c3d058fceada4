"""What `load` and `engine convert` refuse still fails, tried with transformers alone.

A test that fails here means that a library has learned something: take the rule away.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig

from tests.models import tiny_model
from tests.plugins.helpers import IDS

Model = Callable[[str], Path]

PLACES = {
    "model.embed_tokens": "cpu",
    "model.layers": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def load(folder: Path, **options: Any) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32, **options)


def packing(bits: int, **options: Any) -> Any:
    make: Any = BitsAndBytesConfig
    return make(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **options)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_offload(model: Model, tmp_path: Path, bits: int) -> None:
    places = {"device_map": PLACES, "offload_folder": tmp_path}
    with pytest.raises(ValueError, match="dispatched on the CPU or the disk"):
        load(model("llama"), quantization_config=packing(bits), **places)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_offload_cpu(model: Model, tmp_path: Path, bits: int) -> None:
    unpacked = packing(bits, llm_int8_enable_fp32_cpu_offload=True)
    places = {"device_map": PLACES, "offload_folder": tmp_path}
    loaded = load(model("llama"), quantization_config=unpacked, **places)
    kinds = {type(module).__name__ for module in loaded.modules() if hasattr(module, "in_features")}
    assert kinds == {"Linear"}, "nothing is packed"


def test_hooked_compiled(model: Model, tmp_path: Path) -> None:
    placed = load(model("llama"), device_map=PLACES, offload_folder=tmp_path)
    compiled: Any = torch.compile(placed, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"accelerate/hooks\.py"):
        compiled(IDS, use_cache=False)


def test_convert_unsavable(model: Model, tmp_path: Path) -> None:
    make: Any = QuantoConfig
    packed = load(model("llama"), quantization_config=make(weights="int8"))
    with pytest.raises(ValueError, match="not serializable"):
        packed.save_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "olmo2"])
def test_convert_position(tmp_path: Path, family: str) -> None:
    """What config.json says of biases and grouped positions, as other families do, is unread."""
    said = {
        "alibi": True,
        "use_alibi": True,
        "position_embedding_type": "alibi",
        "alibi_bias_max": 8,
        "attn_config": {"alibi": True},
        "self_extend_group_size": 4,
        "group_size_1": 4,
        "group_size_2": 16,
    }
    folder = tiny_model(family, tmp_path)
    before = load(folder)(IDS).logits
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    told = load(folder)
    assert told.config.alibi is True
    assert told(IDS).logits.equal(before)


def test_convert_offloaded(model: Model, tmp_path: Path) -> None:
    state = load(model("llama"), device_map=PLACES, offload_folder=tmp_path).state_dict()
    weight = state["model.layers.0.mlp.up_proj.weight"]
    assert weight.is_meta
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        bool((weight == weight.cpu()).all())  # no number of it can be compared


def test_packing_unreadable(model: Model) -> None:
    """A checkpoint that says that it is packed, where its library is missing, fails to load."""
    auto: Any = AutoModelForCausalLM
    for method, error in (("gptq", (RuntimeError, NameError, ImportError)), ("awq", ImportError)):
        config = load(model("llama")).config
        config.quantization_config = {"quant_method": method, "bits": 4, "group_size": 32}
        with pytest.raises(error):
            auto.from_pretrained(model("llama"), config=config)
