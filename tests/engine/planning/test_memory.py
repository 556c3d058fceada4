"""What a plan says of a pass is what its tensors take, counted one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import builder, generate, recipe
from engine.planning.planner import plan
from tests.models import tiny_model
from tests.storages import Storages

PROMPT = 500
WIDE: dict[str, Any] = {
    "hidden_size": 256, "num_attention_heads": 8, "max_position_embeddings": 1024,
}  # fmt: skip
GATED = {"intermediate_size": 704, "num_key_value_heads": 2}
SIZES: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "qwen3": GATED | {"head_dim": 32},
    "gemma3": GATED | {"head_dim": 32},
    "phi3": GATED,
    "mixtral": GATED,
    "olmo2": GATED,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {"intermediate_size": 1024},
    "opt": {"ffn_dim": 1024, "word_embed_proj_dim": 256},
    "mpt": {"max_seq_len": 1024},
    "gpt_oss": {},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            sizes = WIDE | SIZES[family]
            made[family] = tiny_model(family, tmp_path_factory.mktemp(family), **sizes)
        return made[family]

    return folder


@pytest.mark.parametrize(
    ("family", "words"),
    [
        *((family, "attention=native") for family in SIZES),
        ("llama", "attention=eager"),
        ("gpt_bigcode", "attention=eager"),
        ("llama", "attention=chunked"),
        ("llama", "attention=window attention.size=128"),
        ("llama", "cache=static"),
        ("llama", "cache=fp8"),
        ("llama", "cache=quantized cache.residual=32"),
        ("llama", "quantize=nf4"),
        ("llama", "quantize=quanto"),
        ("llama", "quantize=torchao"),
    ],
)
def test_a_prompt_takes_what_was_planned(
    wide: Callable[[str], Path], family: str, words: str
) -> None:
    """Within 16 % of what the pass adds; the weights, most of a real plan, are exact."""
    overrides = [
        f"model.path={wide(family)}", "model.dtype=float32", "decode.max_new_tokens=4",
        f"workload.prompt_tokens={PROMPT}", *words.split(),
    ]  # fmt: skip
    made = recipe.compose("base", overrides)
    found = plan(made).prompt
    with builder.build(made) as session:
        ids = torch.arange(PROMPT).remainder(300).add(3).tolist()
        values, _ = generate.begin(session, ids)
        with Storages(session.model) as seen:
            steps = generate.steps(session, [ids], values.cache, 4, generate.Clock(session))
            next(steps)
            peak = seen.peak
            steps.close()
    planned = sum(found.passing.values()) + sum(
        size for name, size in found.held.items() if "KV" in name
    )
    assert planned == pytest.approx(peak, rel=0.16)
