"""cache=static allocates once, as much as the plan says, and refuses what it cannot hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine.contexts import CacheContext
from engine.errors import RecipeError, RuntimeFailure
from engine.plugins.cache.static import Static
from tests.conftest import Build
from tests.plugins.helpers import held, hints, probe, receipt, shape_of, verdict


@pytest.mark.parametrize(
    "family", ["llama", "gemma3", "gpt2", "gpt_bigcode", "deepseek_v3", "qwen3_next"]
)
def test_it_is_as_large_as_estimated(build: Build, family: str) -> None:
    session = build("cache=static", family=family)
    evidence = receipt(session, "cache").evidence
    allocated = int(evidence["tokens allocated"])
    planned = held(Static(), shape_of(Path(session.recipe.model.path)), tokens=allocated)
    assert evidence["bytes"] == planned
    assert evidence["tokens held"] == 9


def test_max_tokens_bounds_it(build: Build) -> None:
    session = build("cache=static")
    for wanted, asked, length in ((None, 50, 50), (32, 50, 32), (100, 50, 50)):
        context = CacheContext(config=session.config, batch=1, max_tokens=asked)
        cache = Static(max_tokens=wanted).cache(context).cache
        assert cache is not None
        assert int(cache.get_max_length()) == length
    shape = shape_of(Path(session.recipe.model.path))
    assert held(Static(max_tokens=32), shape, 50) == held(Static(), shape, 32)


def test_what_does_not_fit_is_a_failure_in_words(build: Build) -> None:
    session = build("cache=static", "cache.max_tokens=16", "decode.max_new_tokens=100")
    output = session.generate("ab")
    assert output.finish_reason == "context"
    with pytest.raises(RuntimeFailure, match="the cache holds 16"):
        session.generate("a much longer text than this")


def test_lengths_that_cannot_be_are_refused(model: Callable[[str], Path]) -> None:
    shape = shape_of(model("llama"))
    assert hints(Static(max_tokens=4), shape) == ["cache.max_tokens=128"]
    assert hints(Static(max_tokens=4)) == ["cache.max_tokens=2048"]
    assert hints(Static(max_tokens=129), shape) == ["cache.max_tokens=128"]
    assert hints(Static(max_tokens=129), replace(shape, max_positions=512)) == []
    assert hints(Static(max_tokens=128), shape) == hints(Static(), shape) == []


@pytest.mark.parametrize("family", ["bloom", "falcon"])
def test_native_alibi_is_refused(build: Build, family: str) -> None:
    with pytest.raises(RecipeError, match="ALiBi") as refused:
        build("cache=static", family=family)
    assert [problem.code for problem in refused.value.problems] == ["static-alibi"]


def test_another_cache_is_no_proof(build: Build) -> None:
    session = build("cache=static")
    assert verdict(Static(), session)
    assert not verdict(Static(), session, probe=probe(cache=None))
    assert not verdict(Static(), session, probe=build("cache=dynamic").probe)
