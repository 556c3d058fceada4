"""What cache choices refuse, tried for real: a test that fails tells that a library learned."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Cache, DynamicCache, StaticCache, cache_utils, masking_utils

from engine.attending.scores import key_positions
from engine.caching.evicting import EvictingLayer
from engine.caching.layers import cache_of
from engine.plugins.cache.fp8 import Float8Layer
from engine.plugins.cache.quantized import IntegerLayer
from tests.plugins.cache.evicted import batch, in_pieces, reference
from tests.plugins.helpers import IDS, plain, relative


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_static_alibi(model: Callable[[str], Path], family: str) -> None:
    tried = plain(model(family))
    with pytest.raises(RuntimeError, match="size"):
        tried(
            input_ids=IDS,
            attention_mask=torch.ones_like(IDS),
            past_key_values=StaticCache(config=tried.config, max_cache_len=20),
        )


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_evicting_alibi(model: Callable[[str], Path], family: str) -> None:
    tried = plain(model(family))
    cache: Any = cache_of(tried.config, lambda: EvictingLayer(5))
    ids, mask = batch((8,), 8)
    with pytest.raises(RuntimeError, match="size"):
        in_pieces(tried, cache, ids, mask, (1,) * 8)


def test_sinks_alibi(model: Callable[[str], Path]) -> None:
    tried = plain(model("mpt"))
    ids, mask = batch((24,), 24)
    for sinks, right in ((0, True), (4, False)):
        cache: Any = cache_of(tried.config, partial(EvictingLayer, 8, sinks))
        found = in_pieces(tried, cache, ids, mask, (1,) * 24)
        error = float((found - reference(tried, ids, mask, 8, sinks)).abs().max())
        assert (error < 1e-4) is right


def test_evicting_flash() -> None:
    given = {"batch_size": 1, "q_length": 8, "kv_length": 8, "q_offset": 0, "kv_offset": 0}
    mask: Any = masking_utils.flash_attention_mask
    made = mask(**given, mask_function=masking_utils.sliding_window_causal_mask_function(3))
    assert made is None


def test_evicting_scores(model: Callable[[str], Path]) -> None:
    seen: dict[str, Any] = {}

    def forward(module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any) -> Any:
        seen.update(given, keys=key.shape[-2])
        return torch.zeros_like(query).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("canary", forward)
    transformers.AttentionMaskInterface.register("canary", masking_utils.sdpa_mask)
    try:
        tried = plain(model("llama"), attn_implementation="canary")
        cache: Any = cache_of(tried.config, lambda: EvictingLayer(5))
        ids, mask = batch((8,), 8)
        in_pieces(tried, cache, ids, mask, (1,) * 8)
    finally:
        for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
            del interface._global_mapping["canary"]
    lengths = [each.shape[-1] for each in seen.values() if isinstance(each, torch.Tensor)]
    assert seen["keys"] == 5
    assert set(lengths) == {1}  # the query's position, and nothing as long as the keys


def _offset_of_each_key(columns: torch.Tensor) -> None:
    """Make a mask for keys that lie in several places; a padded batch needs that, too."""
    made: Any = masking_utils.sdpa_mask
    made(
        batch_size=1, q_length=1, kv_length=len(columns), q_offset=20,
        kv_offset=columns - torch.arange(len(columns)), attention_mask=torch.ones(1, 21).bool(),
    )  # fmt: skip


def test_sinks_bias() -> None:
    with pytest.raises(RuntimeError, match="ambiguous"):
        _offset_of_each_key(torch.tensor([0, 1, 2, 17, 18, 19, 20]))


def test_sinks_rotation() -> None:
    columns = [0, 1, 2, 17, 18, 19, 20]
    with pytest.raises(RuntimeError, match="ambiguous"):
        _offset_of_each_key(torch.tensor(columns))
    # So a position counts back from the query's own, which is wrong for the first tokens.
    found = key_positions(torch.tensor([20]), torch.ones(1, 1, 1, 7, dtype=torch.bool), 1, 7)
    assert found[0, 3:].tolist() == columns[3:]
    assert found[0, :3].tolist() != columns[:3]


def test_sinks_window() -> None:
    with pytest.raises(RuntimeError, match="ambiguous"):
        _offset_of_each_key(torch.tensor([0, 1, 2, 17, 18, 19, 20]))
    # With one offset for all, a window hides the first tokens although they are there.
    seen = masking_utils.sdpa_mask(
        batch_size=1, q_length=1, kv_length=3 + 5, q_offset=20, kv_offset=20 - 7,
        mask_function=masking_utils.sliding_window_causal_mask_function(5),
        allow_is_causal_skip=False,
    )  # fmt: skip
    assert seen is not None
    assert seen[0, 0, 0].tolist() == [False] * 3 + [True] * 5


def test_offloaded_needs_cuda(model: Callable[[str], Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = plain(model("llama")).config
    with pytest.raises((AssertionError, RuntimeError)):
        DynamicCache(config=config, offloading=True).update(*torch.zeros(2, 1, 2, 3, 4), 0)


def test_fp8_key_bias() -> None:
    """Codes of 8-bit floats lose keys that lie far from zero; codes by channel do not."""
    auto: Any = transformers.AutoModelForCausalLM
    config = transformers.AutoConfig.for_model(
        "qwen2", vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(1)
    biased = auto.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(3, 320, (1, 60))
    make: dict[str, Callable[[], Any]] = {
        "fp8": Float8Layer,
        "channels": lambda: IntegerLayer(8, 8, 0),
    }

    def answers(cache: Any) -> torch.Tensor:
        with torch.no_grad():
            each = [biased(token[None], past_key_values=cache).logits[0, -1] for token in ids.T]
        return torch.stack(each)

    errors: dict[str, list[float]] = {name: [] for name in make}
    for bias in (0.0, 100.0):
        with torch.no_grad():
            for layer in biased.model.layers:
                layer.self_attn.k_proj.bias.zero_()[7::8] = bias  # hardly rotated
        right = answers(DynamicCache(config=config))
        for name, kind in make.items():
            errors[name].append(relative(answers(cache_of(config, kind)), right))
    assert errors["fp8"][1] > 4 * errors["fp8"][0]
    assert errors["channels"][1] < 2 * errors["channels"][0]


def test_static_bias(model: Callable[[str], Path]) -> None:
    tried = plain(model("inkling"))
    with pytest.raises(RuntimeError, match="size"):
        tried(IDS, past_key_values=StaticCache(config=tried.config, max_cache_len=20))


@pytest.mark.parametrize("family", ["minimax", "rwkv", "xlstm", "recurrent_gemma"])
def test_own_cache(model: Callable[[str], Path], family: str) -> None:
    """A cache that is given stays empty of states, or is not taken."""
    tried = plain(model(family))
    cache: Any = DynamicCache(config=tried.config)
    with suppress(ValueError, TypeError, AttributeError), torch.no_grad():
        tried(IDS, past_key_values=cache, use_cache=True)
    assert not any(
        state is not None
        for layer in cache.layers
        for state in getattr(layer, "recurrent_states", {}).values()
    )


def test_offloaded_hybrid() -> None:
    """States are read before `update`, which alone waits for what is fetched, as are keys."""
    waits = "wait_stream"
    assert waits in inspect.getsource(Cache.update)
    for reads in (Cache.get_conv_state, Cache.get_recurrent_state, Cache.update_conv_state):
        assert waits not in inspect.getsource(reads)
    layer = cache_utils.LinearAttentionAndFullAttentionLayer
    assert "LinearAttentionLayer.prefetch(self)" in inspect.getsource(layer.prefetch)
