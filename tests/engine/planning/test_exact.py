"""From config.json alone, weights, scales and keys and values are planned to the byte."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import builder, generate, recipe
from engine.caching.measuring import measure
from engine.planning.planner import plan
from tests.plugins.helpers import allocated

PROMPT, NEW = 40, 12

PAIRS = [
    # Plain, in families that differ in heads, windows, latents, experts, biases and tied weights.
    *(
        (family, "model.dtype=bfloat16")
        for family in (
            "llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox", "opt", "gpt2",
            "gpt_bigcode", "bloom", "falcon", "falcon-rotary", "mpt", "starcoder2", "olmo2",
            "mixtral", "gpt_oss", "deepseek_v3",
        )
    ),
    # Packed weights: those of a gate and its experts, of latents, of one head for all.
    ("llama", "quantize=nf4"),
    ("llama", "quantize=nf4-double"),
    ("gpt_bigcode", "quantize=nf4"),
    ("bloom", "quantize=int8"),
    ("mixtral", "quantize=nf4"),
    ("deepseek_v3", "quantize=quanto model.dtype=bfloat16"),
    ("gemma3", "quantize=int8"),
    ("phi3", "quantize=torchao model.dtype=bfloat16"),
    ("gpt_oss", "quantize=quanto model.dtype=bfloat16"),
    ("qwen3", "quantize=quanto quantize.bits=4"),
    # Pooled heads.
    ("llama", "heads=grouped heads.num_key_value_heads=1"),
    ("llama", "heads=grouped heads.num_key_value_heads=1 quantize=nf4 cache=quantized"),
    # Caches.
    ("llama", "cache=static"),
    ("gemma3", "cache=static model.dtype=bfloat16"),
    ("llama", "cache=quantized cache.bits=4 cache.group_size=8 cache.residual=8"),
    ("deepseek_v3", "cache=quantized cache.bits=8 cache.group_size=8 cache.residual=0"),
    ("mixtral", "cache=fp8"),
    ("llama", "cache=sinks cache.sinks=4 cache.window=16"),
    ("qwen3", "cache=sliding cache.window=16"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "words"), PAIRS)
def test_what_is_held_is_planned_to_the_byte(
    model: Callable[[str], Path], tmp_path: Path, family: str, words: str
) -> None:
    shutil.copy(model(family) / "config.json", tmp_path)
    asked = [f"workload.prompt_tokens={PROMPT}", f"decode.max_new_tokens={NEW}", *words.split()]
    held = plan(recipe.compose("base", [f"model.path={tmp_path}", *asked])).token.held
    keys = sum(size for name, size in held.items() if "KV" in name)
    weights = {name: held.get(name, 0) for name in ("weights", "packed weights", "scales")}

    made = recipe.compose("base", [f"model.path={model(family)}", *asked])
    with builder.build(made) as session:
        ids = [3 + n for n in range(PROMPT)]
        values, _ = generate.begin(session, ids)
        for _ in generate.steps(session, [ids], values.cache, NEW, generate.Clock(session)):
            pass
        assert weights == allocated(session)
        assert keys == measure(values.cache)["bytes"]
        assert keys > 0
