"""cache=fp8 rounds each token once, is as large as the plan says, and off by what it states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.caching.measuring import measure
from engine.plugins.cache.fp8 import Float8, Float8Layer
from engine.recipe import compose
from engine.verdict import check
from tests.conftest import Build
from tests.models import tiny_model
from tests.plugins.cache.evicted import batch, in_pieces, positions
from tests.plugins.helpers import held, hints, plain, probe, receipt, relative, shape_of, verdict

STATED = 0.2
"""The largest error that the docstring states."""

FAMILIES = ["llama", "gemma3", "gpt_bigcode", "bloom", "deepseek_v3", "lfm2", "mixtral"]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_off_by_no_more_than_it_states(build: Build, family: str) -> None:
    session = build("cache=fp8", family=family)
    ids, mask = batch((60, 60), 60)
    with torch.no_grad():
        exact = plain(Path(session.recipe.model.path))(
            input_ids=ids, position_ids=positions(mask), use_cache=False
        ).logits
    cache = session.new_cache(2, 60).cache
    found = in_pieces(session.model, cache, ids, mask, (30, *[1] * 10, 20))
    assert 1e-3 < relative(found, exact) <= STATED
    planned = held(Float8(), shape_of(Path(session.recipe.model.path)), 60, batch=2)
    assert measure(cache)["bytes"] == planned


def test_a_number_is_off_by_half_a_step(build: Build) -> None:
    keys = torch.randn(2, 3, 7, 16) * torch.tensor([1e-6, 1.0, 1e4])[:, None, None]
    found, _ = Float8Layer().update(keys, torch.zeros_like(keys))
    top = keys.abs().amax((1, 3), keepdim=True)
    # Three bits behind the point; below the smallest normal number the steps stay as they are.
    assert ((found - keys).abs() <= (keys.abs() * 2**-4).clamp(min=1.01 * top / 448 * 2**-10)).all()
    assert not torch.equal(found, keys)


def test_pieces_turns_and_drafts_change_nothing(build: Build) -> None:
    session = build("cache=fp8")
    ids, mask = batch((40, 31), 40)
    once, pieces = (session.new_cache(2, 60).cache for _ in range(2))
    assert pieces is not None
    expected = in_pieces(session.model, once, ids, mask, (40,))
    wrong = ids.flip(1)
    in_pieces(session.model, pieces, torch.cat([ids[:, :25], wrong[:, :9]], 1), mask, (20, 14))
    pieces.crop(-9)
    assert pieces.get_seq_length() == 25
    with torch.no_grad():
        found = session.model(
            input_ids=ids[:, 25:], attention_mask=mask, past_key_values=pieces,
            position_ids=positions(mask)[:, 25:],
        ).logits  # fmt: skip
    assert torch.allclose(found, expected[:, 25:], atol=1e-4)


def test_rows_can_be_picked_and_repeated(build: Build) -> None:
    session = build("cache=fp8")
    ids, mask = batch((20, 20), 20)
    cache: Any = session.new_cache(2, 60).cache
    expected = in_pieces(session.model, cache, ids, mask, (19, 1))[:, -1]
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    with torch.no_grad():
        found = session.model(input_ids=ids[[1, 1, 0, 0], -1:], past_key_values=cache).logits
    assert torch.allclose(found[:, -1], expected[[1, 1, 0, 0]], atol=1e-4)


def test_what_would_do_nothing_is_refused(model: Callable[[str], Path]) -> None:
    assert hints(Float8(), shape_of(model("mistral"))) == ["cache=dynamic"]
    assert hints(Float8(), shape_of(model("gemma3"))) == hints(Float8()) == []


def test_another_cache_is_no_proof(build: Build) -> None:
    session = build("cache=fp8")
    evidence = receipt(session, "cache").evidence
    # One byte instead of four, and two scales of four bytes for each token and layer.
    assert evidence["bytes if unquantized"] == 2 * 9 * 64 * 4
    assert evidence["bytes"] == 2 * 9 * (64 + 8)
    assert verdict(Float8(), session)
    assert not verdict(Float8(), session, probe=probe(cache=None))
    assert not verdict(Float8(), session, probe=probe(cache=session.probe.cache, tokens=(8, 9)))
    assert not verdict(Float8(), session, probe=build("cache=dynamic").probe)


def test_biased_keys_are_noted_and_not_refused(
    build: Build, model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model("opt", tmp_path)
    for cache, notes in (("fp8", 1), ("dynamic", 0)):
        words = [f"model.path={folder}", f"cache={cache}"]
        found = check(compose("base", words))
        assert found.ok
        assert len(found.notes) == notes
        assert build(*words).notes == found.notes
        assert all("fp8 with model.key_bias" in note for note in found.notes)
    assert not check(compose("base", [f"model.path={model('llama')}", "cache=fp8"])).notes
    assert not check(compose("base", [f"model.path={model('qwen3')}", "cache=fp8"])).notes
