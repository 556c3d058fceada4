"""cache=quantized packs full groups, is as large as the plan says, and off by what it states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.caching.measuring import measure
from engine.contexts import CacheContext
from engine.plugins.cache.quantized import IntegerLayer, Quantized
from tests.conftest import Build
from tests.plugins.cache.evicted import batch, in_pieces, positions
from tests.plugins.helpers import held, hints, plain, probe, receipt, relative, shape_of, verdict

STATED = {8: 0.04, 4: 0.3}
"""Bits → the largest error that the docstring states."""

FAMILIES = ["llama", "gemma3", "gpt_bigcode", "bloom", "deepseek_v3", "lfm2", "mixtral"]


def words(options: Quantized) -> list[str]:
    """Return the overrides that choose it."""
    return ["cache=quantized", *(f"cache.{name}={value}" for name, value in vars(options).items())]


def fresh(options: Quantized, model: Any) -> Any:
    """Return an empty cache for a batch of two."""
    return options.cache(CacheContext(config=model.config, batch=2, max_tokens=64)).cache


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_off_by_no_more_than_it_states(model: Callable[[str], Path], family: str) -> None:
    reference_model = plain(model(family))
    ids, mask = batch((60, 60), 60)
    with torch.no_grad():
        exact = reference_model(input_ids=ids, position_ids=positions(mask), use_cache=False).logits
    for options in (Quantized(8, 16, 0), Quantized(4, 16, 8)):
        cache = fresh(options, reference_model)
        found = in_pieces(reference_model, cache, ids, mask, (20, *[1] * 40))
        assert 1e-4 < relative(found, exact) <= STATED[options.bits]


@pytest.mark.parametrize("family", ["llama", "gpt_bigcode", "gemma3", "deepseek_v3", "lfm2"])
def test_it_is_as_large_as_estimated(model: Callable[[str], Path], family: str) -> None:
    reference_model, shape = plain(model(family)), shape_of(model(family))
    ids, mask = batch((61, 61), 61)
    for options in (Quantized(8, 16, 0), Quantized(4, 8, 8), Quantized(4, 32, 5)):
        for tokens in (7, 16, 24, 25, 61):
            cache = fresh(options, reference_model)
            in_pieces(reference_model, cache, ids, mask, (tokens - 3, 1, 1, 1))
            planned = held(options, shape, tokens, batch=2)
            assert measure(cache)["bytes"] == planned


@pytest.mark.parametrize("bits", [4, 8])
def test_a_number_is_off_by_half_a_step_of_its_group(bits: int) -> None:
    torch.manual_seed(3)
    keys, values = torch.randn(2, 3, 64, 16), torch.randn(2, 3, 64, 8)
    keys[..., 5] *= 50  # an outlier channel, which must not spoil the others
    layer = IntegerLayer(bits, 16, 0)
    layer.update(keys, values)
    assert layer.packed == 64
    none = keys[:, :, :0]
    kept, kept_values = layer.update(none, values[:, :, :0])
    grouped = keys.reshape(2, 3, 4, 16, 16)
    step = (grouped.amax(3, keepdim=True) - grouped.amin(3, keepdim=True)) / (2**bits - 1)
    assert ((kept.reshape(grouped.shape) - grouped).abs() <= 0.51 * step).all()
    rows = values.transpose(1, 2).reshape(2, 64, 3, 8)
    step = (rows.amax(-1, keepdim=True) - rows.amin(-1, keepdim=True)) / (2**bits - 1)
    found = kept_values.transpose(1, 2).reshape(2, 64, 3, 8)
    assert ((found - rows).abs() <= 0.51 * step).all()


def test_the_newest_tokens_stay_as_they_came() -> None:
    keys, values = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    layer = IntegerLayer(4, 16, 10)
    first, _ = layer.update(keys[:, :, :30], values[:, :, :30])
    assert torch.equal(first, keys[:, :, :30])
    kept, kept_values = layer.update(keys[:, :, 30:], values[:, :, 30:])
    assert torch.equal(kept[:, :, 16:], keys[:, :, 16:])
    assert torch.equal(kept_values[:, :, 16:], values[:, :, 16:])
    assert not torch.equal(kept[:, :, :16], keys[:, :, :16])


@pytest.mark.parametrize("removed", [3, 12, 20, 40])
def test_cutting_leaves_what_was_there(removed: int) -> None:
    keys, values = torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 8)
    layer = IntegerLayer(4, 16, 10)
    layer.update(keys, values)
    none = keys[:, :, :0]
    before = layer.update(none, none)
    layer.crop(-removed)
    assert layer.get_seq_length() == layer.get_mask_sizes(0)[0] == 50 - removed
    after = layer.update(none, none)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new, old[:, :, : 50 - removed])
    grown, _ = layer.update(keys, values)
    assert grown.shape[2] == 100 - removed


def test_rows_can_be_picked_and_repeated(build: Build) -> None:
    session = build(*words(Quantized(4, 8, 0)))
    ids, mask = batch((20, 20), 20)
    cache: Any = session.new_cache(2, 60).cache
    expected = in_pieces(session.model, cache, ids, mask, (17, 3))[:, -3:]
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    with torch.no_grad():
        found = session.model(input_ids=ids[[1, 1, 0, 0], -3:], past_key_values=cache).logits
    assert torch.allclose(found, expected[[1, 1, 0, 0]], atol=1e-4)


def test_options_that_cannot_be_are_refused(model: Callable[[str], Path]) -> None:
    shape = shape_of(model("llama"))
    assert hints(Quantized(bits=3), shape) == ["cache.bits=4"]
    assert hints(Quantized(group_size=12), shape) == ["cache.group_size=32"]
    assert hints(Quantized(residual=-1), shape) == ["cache.residual=128"]
    assert hints(Quantized(), shape) == hints(Quantized(8, 8, 0)) == []
    assert hints(Quantized(), shape_of(model("mistral"))) == ["cache=dynamic"]


def test_another_cache_is_no_proof(build: Build) -> None:
    options = Quantized(4, 16, 8)
    session = build(*words(options))
    evidence = receipt(session, "cache").evidence
    # Nine of the probe and 24 more: 16 tokens are packed, 17 are not.
    packed = 16 * 64 // 2 + 2 * 4 * (32 + 16 * 2)
    assert evidence["bytes of 33 tokens in a layer"] == packed + 17 * 64 * 4
    assert evidence["bytes of 33 tokens if unquantized"] == 33 * 64 * 4
    assert verdict(options, session)
    assert not verdict(Quantized(8, 16, 8), session)
    assert not verdict(options, session, probe=probe(cache=None))
    assert not verdict(options, session, probe=build("cache=dynamic").probe)
