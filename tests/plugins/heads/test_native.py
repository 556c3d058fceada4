"""heads=native reads the heads off the real projections."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engine.plugins.heads.native import NativeHeads
from tests.conftest import Build
from tests.plugins.helpers import receipt, verdict


@pytest.mark.parametrize(
    ("family", "kv_heads", "kind"),
    [
        ("llama", 2, "GQA"),
        ("gpt2", 4, "MHA"),
        ("gpt_bigcode", 1, "MQA"),
        ("phi3", 2, "GQA"),
        ("opt", 4, "MHA"),
        ("gpt_neox", 4, "MHA"),
        ("bloom", 4, "MHA"),
        ("falcon", 4, "MHA"),
        ("falcon-rotary", 2, "GQA"),
    ],
)
def test_heads_are_counted(build: Build, family: str, kv_heads: int, kind: str) -> None:
    evidence = receipt(build(family=family), "heads").evidence
    assert (evidence["query heads"], evidence["kv heads"]) == (4, kv_heads)
    assert evidence["kind"] == kind


def test_packed_weights_count_the_same(build: Build) -> None:
    assert receipt(build("quantize=bitsandbytes"), "heads").evidence["kv heads"] == 2


def test_pooled_heads_contradict_it(build: Build) -> None:
    session = build("heads=grouped")
    assert not verdict(NativeHeads(), session)
    assert not verdict(NativeHeads(), session, source_config=session.config, model=build().model)


def test_an_unknown_layout_is_compared_by_config(build: Build) -> None:
    session = build()
    decoder = SimpleNamespace(named_modules=lambda: iter(()))
    model = SimpleNamespace(config=session.config, get_decoder=lambda: decoder)
    assert verdict(NativeHeads(), session, model=model)
    assert not verdict(
        NativeHeads(), session, model=model, source_config=build("heads=grouped").config
    )
