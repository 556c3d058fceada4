"""How many tokens fit: into the cache, and behind a prompt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import Cache

from engine.errors import RuntimeFailure
from engine.generate import capacity, check_prompt, room_for
from tests.conftest import Build


def test_keys_of_a_fixed_size_beside_a_state_are_counted(build: Build) -> None:
    words = ["cache=static", "cache.max_tokens=32", "decode.max_new_tokens=4"]
    session = build(*words, family="falcon_h1")
    assert capacity(session.new_cache(1, 32).cache, None) == 32
    with pytest.raises(RuntimeFailure, match="and the cache holds 32"):
        session.generate("def add(a, b): return a + b, " * 4)


def cache_of(*lengths: int | tuple[int, bool]) -> Cache:
    """Return a cache with a layer for each length; those with True slide."""
    pairs = [each if isinstance(each, tuple) else (each, False) for each in lengths]
    layers = [
        SimpleNamespace(get_max_length=lambda most=most: most, is_sliding=slides)
        for most, slides in pairs
    ]
    return cast(Cache, SimpleNamespace(layers=layers))


@pytest.mark.parametrize(
    ("lengths", "window", "expected"),
    [
        ((100,), None, 100),
        ((100, 60, 80), None, 60),
        ((60, 100), None, 60),
        ((-1, -1), None, None),
        ((-1, 70), None, 70),
        ((), None, None),
        (((16, True),), 16, None),
        (((16, True), 100), 16, 100),
        (((12, True), 100), 16, 12),
        (((16, True), (20, True)), 16, None),
        (((16, True), 10), 16, 10),
    ],
)
def test_a_cache_holds_what_its_smallest_layer_holds(
    lengths: Any, window: int | None, expected: int | None
) -> None:
    assert capacity(cache_of(*lengths), window) == expected


def test_no_cache_has_no_end() -> None:
    assert capacity(None, 16) is None


@pytest.mark.parametrize(("prompt", "room"), [(8, 12), (19, 1), (1, 19)])
def test_the_last_token_needs_no_place(build: Build, prompt: int, room: int) -> None:
    session = build("cache=static", "cache.max_tokens=20", "decode.max_new_tokens=4")
    cache = session.new_cache(1, 20).cache
    assert room_for(session, cache, prompt) == room
    with pytest.raises(RuntimeFailure, match=r"the prompt has 20 tokens, and the cache holds 20"):
        room_for(session, cache, 20)


def test_the_context_is_the_end_where_it_comes_first(build: Build) -> None:
    session = build("cache=dynamic")
    assert session.context_tokens == 128
    assert room_for(session, session.new_cache(1, 20).cache, 100) == 28
    assert room_for(session, None, 127) == 1


def test_a_prompt_that_fills_the_context_is_told_of_it(build: Build) -> None:
    session = build("cache=dynamic")
    check_prompt(session, [5] * 127)
    with pytest.raises(RuntimeFailure, match="has positions for 128, prompt and answer together"):
        check_prompt(session, [5] * 128)
