"""cache=none recomputes, and shows it."""

from __future__ import annotations

from engine.plugins.cache.none import NoCache
from tests.conftest import Build
from tests.plugins.helpers import probe, receipt, verdict


def test_every_token_is_sent_again(build: Build) -> None:
    session = build("cache=none", "decode.max_new_tokens=5")
    assert receipt(session, "cache").evidence["tokens per forward pass"] == "8, 9"
    figures = session.generate("def add").figures
    first = figures.prompt_tokens
    assert figures.forwarded_tokens == sum(range(first, first + 5))


def test_the_answer_is_that_of_a_cache(build: Build) -> None:
    without, with_cache = build("cache=none"), build("cache=dynamic")
    assert without.generate("def add").token_ids == with_cache.generate("def add").token_ids


def test_a_cache_or_a_single_token_contradicts_it(build: Build) -> None:
    session = build("cache=none")
    assert not verdict(NoCache(), session, probe=probe(tokens=(8, 1)))
    assert not verdict(NoCache(), session, probe=probe(tokens=(8,)))
    assert not verdict(NoCache(), session, probe=build("cache=dynamic").probe)
