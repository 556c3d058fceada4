"""cache=sinks gives what a mask over all tokens would give, in padded batches too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.caching.evicting import MOST
from engine.caching.measuring import measure
from engine.contexts import CacheContext
from engine.plugins.cache.sinks import Sinks
from tests.conftest import Build
from tests.plugins.cache.evicted import batch, in_pieces, reference
from tests.plugins.helpers import held, hints, plain, probe, receipt, shape_of, verdict

SINKS, WINDOW = 3, 17
WORDS = ("cache=sinks", f"cache.sinks={SINKS}", f"cache.window={WINDOW}")
PIECES = (40, 1, 1, 9, 1, 8)
"""A prompt longer than what is kept, steps, another turn, steps, another turn."""


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "deepseek_v3", "lfm2"])
def test_it_is_a_mask_over_all_tokens(build: Build, family: str) -> None:
    session = build(*WORDS, family=family)
    # The last row's first tokens are not all in the first piece; one is its whole prompt.
    for lengths in ((60,), (60, 45, 23, 21)):
        ids, mask = batch(lengths, 60)
        expected = reference(plain(Path(session.recipe.model.path)), ids, mask, WINDOW, SINKS)
        cache = session.new_cache(len(lengths), 60).cache
        found = in_pieces(session.model, cache, ids, mask, PIECES)
        real = mask.bool()
        assert torch.allclose(found[real], expected[real], atol=1e-4)
        assert measure(cache)["tokens held"] == SINKS + WINDOW - 1


def test_token_by_token_is_the_same(build: Build) -> None:
    session = build(*WORDS)
    ids, mask = batch((60, 58, 41), 60)
    caches = [session.new_cache(3, 60).cache for _ in range(2)]
    pieces = in_pieces(session.model, caches[0], ids, mask, PIECES)
    single = in_pieces(session.model, caches[1], ids, mask, (1,) * 60)
    real = mask.bool()
    assert torch.allclose(pieces[real], single[real], atol=1e-4)


def test_the_first_tokens_count(build: Build) -> None:
    ids, mask = batch((60,), 60)
    found = []
    for words in (WORDS, ("cache=sliding", f"cache.window={WINDOW}")):
        session = build(*words)
        cache = session.new_cache(1, 60).cache
        found.append(in_pieces(session.model, cache, ids, mask, PIECES)[0, -1])
    assert not torch.allclose(found[0], found[1], atol=1e-1)


def test_a_batch_answers_as_each_alone(build: Build) -> None:
    session = build(*WORDS, "decode.max_new_tokens=12")
    prompts = ["def add(a, b): return a + b  # the sum of two numbers", "def", "a = [1, 2, 3]"]
    together = session.generate(prompts)
    for prompt, output in zip(prompts, together, strict=True):
        assert output.token_ids == session.generate(prompt).token_ids


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_bigcode", "deepseek_v3", "lfm2"])
def test_it_is_as_large_as_estimated(model: Callable[[str], Path], family: str) -> None:
    reference_model = plain(model(family))
    for tokens in (5, 40):
        context = CacheContext(config=reference_model.config, batch=2, max_tokens=tokens)
        cache = Sinks(sinks=SINKS, window=WINDOW).cache(context).cache
        ids, mask = batch((tokens, tokens), tokens)
        in_pieces(reference_model, cache, ids, mask, (tokens,))
        planned = held(Sinks(sinks=SINKS, window=WINDOW), shape_of(model(family)), tokens, batch=2)
        assert measure(cache)["bytes"] == planned


def test_what_cannot_be_is_refused(model: Callable[[str], Path]) -> None:
    shape = shape_of(model("llama"))
    assert hints(Sinks(sinks=0), shape) == ["cache.sinks=4, or cache=sliding"]
    assert hints(Sinks(window=0), shape) == ["cache.window=1024"]
    assert hints(Sinks(sinks=1, window=2), shape) == hints(Sinks(sinks=MOST), shape) == []
    assert hints(Sinks(sinks=MOST + 1), shape) == ["cache=dynamic, which forgets nothing"]


def test_another_cache_is_no_proof(build: Build) -> None:
    session = build(*WORDS)
    evidence = receipt(session, "cache").evidence
    assert evidence["of a longer text, tokens held"] == SINKS + WINDOW - 1
    assert evidence["of a longer text, tokens seen"] == 9 + SINKS + WINDOW - 1
    own = Sinks(sinks=SINKS, window=WINDOW)
    assert verdict(own, session)
    assert not verdict(own, session, probe=probe(cache=None))
    assert not verdict(own, session, probe=probe(cache=session.probe.cache, tokens=(8, 9)))
    assert not verdict(own, session, probe=build("cache=dynamic").probe)
