"""heads=grouped pools exactly, while loading, and leaves no trace in the process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engine.contexts import HeadsContext, ReshapeContext
from engine.errors import CheckpointError, EngineError, RecipeError
from engine.plugins.heads.grouped import GroupedHeads
from engine.shape import read_shape
from tests.conftest import Build
from tests.models import tiny_config, tiny_model
from tests.plugins.helpers import (
    hints,
    logits,
    plain,
    receipt,
    refusals,
    relative,
    shape_of,
    verdict,
)

registry: Any = conversion_mapping


def pooled(folder: Path, kv_heads: int) -> Any:
    """Return the reference: the checkpoint's heads averaged by hand, one after the other."""
    original = plain(folder)
    old, size = original.config.num_key_value_heads, original.model.layers[0].self_attn.head_dim
    config = original.config.__class__(
        **{**original.config.to_dict(), "num_key_value_heads": kv_heads}
    )
    config._attn_implementation = "eager"
    model = type(original)(config).eval()
    state = original.state_dict()
    for name in [name for name in state if ".k_proj." in name or ".v_proj." in name]:
        heads = state[name].split(size)
        group = old // kv_heads
        means = [sum(heads[i * group : (i + 1) * group]) / group for i in range(kv_heads)]
        state[name] = torch.cat(means)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_heads_are_means(build: Build, tmp_path: Path, family: str, kv_heads: int) -> None:
    folder = tiny_model(family, tmp_path, num_key_value_heads=4)
    session = build(
        f"model.path={folder}",
        "attention=eager",
        "heads=grouped",
        f"heads.num_key_value_heads={kv_heads}",
    )
    assert relative(logits(session.model), logits(pooled(folder, kv_heads))) < 1e-5
    evidence = receipt(session, "heads").evidence
    assert (evidence["kv heads before"], evidence["kv heads after"]) == (4, kv_heads)
    assert evidence["rows of each"] == str(16 * kv_heads)
    assert evidence["largest difference from the checkpoint's mean"] == 0.0
    assert session.generate("def add").token_ids


def test_biases_are_pooled_too(build: Build, tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path, attention_bias=True)
    session = build(f"model.path={folder}", "attention=eager", "heads=grouped")
    assert session.model.model.layers[0].self_attn.k_proj.bias.shape == (16,)
    assert relative(logits(session.model), logits(pooled(folder, 1))) < 1e-5


def test_it_saves_and_loads_again(build: Build, tmp_path: Path) -> None:
    session = build("attention=eager", "heads=grouped")
    session.model.save_pretrained(tmp_path)
    assert logits(plain(tmp_path)).equal(logits(session.model))


def test_the_next_load_is_not_pooled(build: Build) -> None:
    before = registry.USER_REGISTERED_MAPPINGS.copy()
    known = registry.get_checkpoint_conversion_mapping("llama")
    path = Path(build("heads=grouped").recipe.model.path)
    assert before == registry.USER_REGISTERED_MAPPINGS
    assert registry.get_checkpoint_conversion_mapping("llama") == known
    assert plain(path).config.num_key_value_heads == 2
    assert build().model.model.layers[0].self_attn.k_proj.weight.shape == (32, 64)


def test_a_failed_load_leaves_no_trace(tmp_path: Path, build: Build) -> None:
    folder = tiny_model("llama", tmp_path)
    (folder / "config.json").write_text(
        (folder / "config.json")
        .read_text()
        .replace('"intermediate_size": 128', '"intermediate_size": 96')
    )
    with pytest.raises(EngineError, match="6 tensors"):
        build(f"model.path={folder}", "heads=grouped")
    assert registry.get_checkpoint_conversion_mapping("llama") is None


@pytest.mark.parametrize("bits", [4, 8])
def test_heads_are_pooled_before_they_are_packed(build: Build, bits: int) -> None:
    session = build("heads=grouped", "quantize=bitsandbytes", f"quantize.bits={bits}")
    assert session.model.model.layers[0].self_attn.k_proj.out_features == 16
    reference = logits(pooled(Path(session.recipe.model.path), 1))
    assert relative(logits(session.model), reference) < {8: 0.1, 4: 0.8}[bits]


def test_the_cache_shrinks_with_them(build: Build) -> None:
    size = {
        choice: int(receipt(build(f"heads={choice}"), "cache").evidence["bytes"])
        for choice in ("native", "grouped")
    }
    assert size["grouped"] * 2 == size["native"]


def test_what_cannot_be_pooled_is_refused(model: Callable[[str], Path], build: Build) -> None:
    llama = shape_of(model("llama"))
    assert hints(GroupedHeads(1), llama) == []
    assert hints(GroupedHeads(2), llama) == ["heads=native"]
    assert hints(GroupedHeads(3), llama) == ["heads.num_key_value_heads=1"]
    assert hints(GroupedHeads(3), replace(llama, kv_heads=12)) == []
    assert hints(GroupedHeads(5), replace(llama, kv_heads=12)) == ["heads.num_key_value_heads=4"]
    assert hints(GroupedHeads(0), llama) == ["heads.num_key_value_heads=1"]
    assert len(hints(GroupedHeads(1), replace(llama, quantization="bitsandbytes"))) == 1
    assert hints(GroupedHeads(1)) == []
    with pytest.raises(RecipeError, match="as many key/value heads as query heads"):
        GroupedHeads(1).heads(HeadsContext(config=tiny_config("opt")))
    with pytest.raises(RecipeError, match="cannot pool 2"):
        GroupedHeads(2).heads(HeadsContext(config=build().config))


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gpt2", "share one matrix"),
        ("phi3", "share one matrix"),
        ("opt", "as many key/value heads as query heads, always"),
        ("olmo2", "its k_norm works on all key/value heads at once"),
        ("deepseek_v3", "one latent vector"),
    ],
)
def test_layouts_without_heads_to_pool_are_refused(
    model: Callable[[str], Path], family: str, why: str
) -> None:
    (told,) = refusals(GroupedHeads(1), shape_of(model(family)))
    assert (told.code, told.hint) == ("heads-unsupported", "heads=native")
    assert why in told.message


def test_norms_that_a_config_switches_on() -> None:
    """Cohere's norm spans all heads; where it is switched off, nothing is in the way."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    for on in (False, True):
        config = AutoConfig.for_model("cohere", use_qk_norm=on, **sizes)
        assert hints(GroupedHeads(1), read_shape(config.to_dict())) == []  # it cannot tell yet
        if on:
            with pytest.raises(RecipeError, match="its k_norm works on all"):
                GroupedHeads(1).heads(HeadsContext(config=config))
        else:
            GroupedHeads(1).heads(HeadsContext(config=config))


def test_check_and_build_agree_on_every_model_type() -> None:
    """With the config that each type has by default, and half of its key/value heads."""
    disagree, pooled = [], 0
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config: Any = AutoConfig.for_model(model_type)
            shape = read_shape(config.to_dict())
        except (ValueError, CheckpointError, StrictDataclassError):
            continue  # without defaults that make a model
        plugin = GroupedHeads(max(1, shape.kv_heads // 2))
        refused = bool(hints(plugin, shape))
        try:
            made = read_shape(plugin.heads(HeadsContext(config=config)).config.to_dict())
        except RecipeError:
            disagree += [] if refused else [f"{model_type}: refused late"]
            continue
        reshaped = plugin.reshape(ReshapeContext(recipe=None, shape=shape))  # type: ignore[arg-type]
        if refused or reshaped is None or made.kv_values != reshaped.kv_values:
            disagree.append(f"{model_type}: refused {refused}, or reshaped otherwise")
        pooled += 1
    assert not disagree
    assert pooled > 60


def test_made_up_weights_claim_no_means(build: Build) -> None:
    made = receipt(build("heads=grouped", "load=random"), "heads")
    assert "made with this many" in made.claim
    assert "means" not in made.claim
    assert "means" in receipt(build("heads=grouped"), "heads").claim


def test_heads_that_were_not_pooled_are_no_proof(build: Build) -> None:
    session = build("heads=grouped")
    assert verdict(GroupedHeads(1), session)
    assert not verdict(GroupedHeads(1), build(), source_config=session.source_config)
    with torch.no_grad():
        session.model.model.layers[0].self_attn.v_proj.weight[0, 0] += 1
    assert not verdict(GroupedHeads(1), session)
