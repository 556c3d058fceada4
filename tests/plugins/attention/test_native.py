"""attention=native leaves the choice to transformers, and tells it."""

from __future__ import annotations

import pytest

from engine.contexts import Attention, AttentionContext
from engine.plugins.attention.native import NativeAttention
from tests.conftest import Build
from tests.models import tiny_config
from tests.plugins.helpers import probe, receipt, verdict


@pytest.mark.parametrize(
    ("family", "implementation"), [("llama", "sdpa"), ("gpt2", "sdpa"), ("bloom", "eager")]
)
def test_it_tells_what_transformers_chose(build: Build, family: str, implementation: str) -> None:
    found = receipt(build(family=family), "attention")
    assert found.ok
    assert found.evidence["implementation"] == implementation


def test_it_names_nothing() -> None:
    assert NativeAttention().attention(AttentionContext(config=tiny_config("llama"))) == Attention()


def test_no_attention_is_no_proof(build: Build) -> None:
    assert not verdict(NativeAttention(), build(), probe=probe({"aten::mm": 5}))
