"""cache=dynamic grows with the tokens, and is as large as the plan says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.contexts import CacheContext
from engine.plugins.cache.dynamic import Dynamic
from tests.conftest import Build
from tests.plugins.helpers import held, plain, probe, receipt, shape_of, verdict


@pytest.mark.parametrize(
    "family",
    ["llama", "gemma3", "gpt2", "gpt_bigcode", "bloom", "falcon", "mpt", "deepseek_v3", "lfm2"],
)
def test_it_is_as_large_as_estimated(build: Build, family: str) -> None:
    session = build(family=family)
    evidence = receipt(session, "cache").evidence
    shape = shape_of(Path(session.recipe.model.path))
    planned = held(Dynamic(), shape, tokens=9)
    assert evidence["bytes"] == planned
    assert evidence["tokens held"] == evidence["tokens sent"] == 9
    assert held(Dynamic(), shape, tokens=9, batch=3, dtype="bfloat16") == planned * 3 / 2


def test_a_sliding_layer_keeps_its_window_only(build: Build) -> None:
    session = build(family="mistral")
    cache = Dynamic().cache(CacheContext(config=session.config, batch=1, max_tokens=64)).cache
    assert cache is not None
    with torch.no_grad():
        session.model(input_ids=torch.arange(50)[None] + 3, past_key_values=cache)
    planned = held(Dynamic(), shape_of(Path(session.recipe.model.path)), tokens=50)
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == planned


def test_the_dtype_of_the_checkpoint_counts(model: object, build: Build) -> None:
    shape = shape_of(Path(build().recipe.model.path))
    exact, stored = (held(Dynamic(), shape, 9, dtype=name) for name in ("float32", "auto"))
    assert shape.dtype == "float32"
    assert exact == stored


def test_an_empty_or_wrong_cache_is_no_proof(build: Build) -> None:
    session = build()
    full = session.probe.cache
    assert verdict(Dynamic(), session, probe=probe(cache=full))
    assert not verdict(Dynamic(), session, probe=probe(cache=None))
    assert not verdict(Dynamic(), session, probe=probe(cache=full, tokens=(8, 9)))
    assert not verdict(Dynamic(), build("cache=static"))
    empty = SimpleNamespace(layers=[], get_seq_length=lambda: 9)
    assert not verdict(Dynamic(), session, probe=probe(cache=empty))


def test_answers_are_those_of_plain_transformers(build: Build) -> None:
    session = build("attention=eager", "decode.max_new_tokens=20")
    ids = session.tokenizer("def add", return_tensors="pt")["input_ids"]
    reference = plain(Path(session.recipe.model.path)).generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
    )
    assert session.generate("def add").token_ids == reference[0, ids.shape[1] :].tolist()
