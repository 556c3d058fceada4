"""Rules of decoding, tried for real: each test fails when the library has learned it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, StaticCache

from tests.models import tiny_model
from tests.plugins.helpers import IDS, plain


def assisted(model: Any, cache: Any) -> Any:
    return model.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=12,
        do_sample=False,
        prompt_lookup_num_tokens=3,
        past_key_values=cache,
    )


def test_speculation_static_cache(model: Callable[[str], Path]) -> None:
    llama = plain(model("llama"))
    cache = StaticCache(config=llama.config, max_cache_len=40)
    with pytest.raises(ValueError, match=r"[Ss]tatic"):
        assisted(llama, cache)
    with torch.no_grad():
        llama(IDS, past_key_values=cache)
    with pytest.raises(AttributeError):
        cache.crop(-1)


def test_speculation_evicting_cache(model: Callable[[str], Path]) -> None:
    """A window that does not record drops what a rejected draft would need again."""
    mistral = plain(model("mistral"))
    cache = DynamicCache(config=mistral.config)
    with torch.no_grad():
        mistral(IDS.repeat(1, 3), past_key_values=cache)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-2)


def test_speculation_recurrent_model(model: Callable[[str], Path]) -> None:
    hybrid = plain(model("qwen3_next"))
    cache = DynamicCache(config=hybrid.config)
    with torch.no_grad():
        hybrid(IDS, past_key_values=cache)
    assert not cache.is_croppable


def test_speculation_longrope(tmp_path: Path) -> None:
    """Which angles a pass uses follows from its longest text, drafts included."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 10,
        **factors,
    }
    folder = tiny_model("phi3", tmp_path, rope_parameters=rope, original_max_position_embeddings=10)
    phi = plain(folder)
    drafts = torch.cat([IDS, torch.tensor([[5, 6, 7, 8]])], dim=-1)
    with torch.no_grad():
        short, long = (phi(ids, use_cache=False).logits[0, 7] for ids in (IDS, drafts))
    assert not torch.allclose(short, long, atol=1e-3)


def test_beam_unrepeatable_cache(model: Callable[[str], Path]) -> None:
    llama = plain(model("llama"))
    cache = QuantizedCache(backend="fp8", config=llama.config)
    with torch.no_grad():
        llama(IDS, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        with pytest.raises(RuntimeError):
            llama(IDS[:, :1].repeat(2, 1), past_key_values=cache)


def test_compiled_growing_cache(model: Callable[[str], Path]) -> None:
    """A growing cache is not one that transformers lets the compiler have."""
    llama = plain(model("llama"))
    cache: Any = DynamicCache(config=llama.config)
    seen = set()
    with torch.no_grad():
        for token in IDS.T:
            llama(token[None], past_key_values=cache)
            seen.add(cache.layers[0].keys.shape)
    assert not cache.is_compileable
    assert len(seen) == IDS.shape[1]
