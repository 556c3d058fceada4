"""Rules of decoding, tried for real: each test fails when the library has learned it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    QuantizedCache,
    StaticCache,
)

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
    with pytest.raises(AttributeError, match="crop"):
        cache.crop(-1)
    # Nor do drafts go away by writing over them: the cache counts them, and masks go by that.
    held = int(cache.get_seq_length())
    with torch.no_grad():
        llama(torch.tensor([[5, 6, 7]]), past_key_values=cache)
        after = llama(IDS[:, :1], past_key_values=cache).logits
        right = llama(torch.cat([IDS, IDS[:, :1]], -1), use_cache=False).logits[:, -1:]
    assert int(cache.get_seq_length()) == held + 4
    assert not torch.allclose(after, right, atol=1e-3)


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


def test_speculation_by_pass(model: Callable[[str], Path]) -> None:
    """Outliers of later tokens, which a token does not see, change its logits."""
    make: Any = BitsAndBytesConfig
    auto: Any = AutoModelForCausalLM
    llama = auto.from_pretrained(
        model("llama"),
        dtype=torch.float32,
        quantization_config=make(load_in_8bit=True),
        device_map={"": torch.device("cpu")},
    )
    layers = [each for each in llama.modules() if type(each).__name__ == "Linear8bitLt"]
    assert {layer.state.threshold for layer in layers} == {6.0}
    largest = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: largest.append(inputs[0].abs().max()))

    def difference() -> float:
        with torch.no_grad():
            whole, part = (llama(ids, use_cache=False).logits[:, :5] for ids in (IDS, IDS[:, :5]))
        return float((whole - part).abs().max())

    assert difference() > 1e-2
    assert max(largest) > 6
    for layer in layers:
        layer.state.threshold = 0.0
    assert difference() < 1e-5  # nothing else does it


def test_beam_unrepeatable_cache(model: Callable[[str], Path]) -> None:
    llama = plain(model("llama"))
    cache = QuantizedCache(backend="fp8", config=llama.config)
    with torch.no_grad():
        llama(IDS, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        with pytest.raises(RuntimeError):
            llama(IDS[:, :1].repeat(2, 1), past_key_values=cache)


def test_compiled_growing_cache(model: Callable[[str], Path]) -> None:
    """A graph is recorded for given shapes, and a growing cache has others for each token."""
    from torch._inductor import cudagraph_utils

    llama = plain(model("llama"))
    seen: dict[str, set[torch.Size]] = {"dynamic": set(), "static": set()}
    caches: dict[str, Any] = {
        "dynamic": DynamicCache(config=llama.config),
        "static": StaticCache(config=llama.config, max_cache_len=20),
    }
    with torch.no_grad():
        for name, cache in caches.items():
            for token in IDS.T:
                llama(token[None], past_key_values=cache)
                seen[name].add(cache.layers[0].keys.shape)
    assert (len(seen["dynamic"]), len(seen["static"])) == (IDS.shape[1], 1)
    assert not caches["dynamic"].is_compileable
    assert caches["static"].is_compileable
    warned = inspect.getsource(cudagraph_utils.maybe_warning_due_to_dynamic_shape)
    assert "recording a new graph for each" in warned


def test_a_growing_cache_is_compiled_twice_and_not_for_each_token(
    model: Callable[[str], Path],
) -> None:
    """It once was (transformers issue 37908): no rule says so, and graphs are another matter."""
    llama = plain(model("llama"), attn_implementation="sdpa")
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    compiled: Any = torch.compile(llama.forward, backend="eager", fullgraph=True)
    caches = [DynamicCache(config=llama.config) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            llama(IDS, past_key_values=cache)
        for length in range(IDS.shape[1] + 1, 20):
            given = {
                "input_ids": torch.tensor([[length]]),
                "attention_mask": torch.ones(1, length, dtype=torch.long),
            }
            found = compiled(**given, past_key_values=caches[0]).logits
            assert torch.allclose(found, llama(**given, past_key_values=caches[1]).logits)
    assert counters["stats"]["unique_graphs"] - before == 2


def test_compiled_dynamic_rope(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    llama = plain(tiny_model("llama", tmp_path, rope_parameters=rope))
    torch._dynamo.reset()
    step: Any = torch.compile(llama.forward, fullgraph=True, backend="eager")
    with torch.no_grad(), pytest.raises(Unsupported, match="Data-dependent branching"):
        step(input_ids=IDS, use_cache=False)


def test_compiled_alibi(model: Callable[[str], Path]) -> None:
    mpt = plain(model("mpt"))
    cache = StaticCache(config=mpt.config, max_cache_len=20)
    torch._dynamo.reset()
    step: Any = torch.compile(mpt.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        mpt(input_ids=IDS, past_key_values=cache)
        with pytest.raises(Exception, match=r"Dynamo|unbacked|[Dd]ata-dependent"):
            step(
                input_ids=IDS[:, :1],
                attention_mask=torch.ones((1, 9), dtype=torch.long),
                past_key_values=cache,
            )


def test_compiled_own_cache(model: Callable[[str], Path]) -> None:
    """Of types of layers that only a family's code knows, none has a fixed size."""
    config = plain(model("deepseek_v4")).config
    with pytest.raises(KeyError, match="compressed"):
        StaticCache(config=config, max_cache_len=20)
