"""attention=native leaves the choice to transformers, and tells it."""

from __future__ import annotations

import pytest

from engine.contexts import Attention, AttentionContext
from engine.plugins.attention.native import NativeAttention
from tests.conftest import Build
from tests.models import tiny_config
from tests.plugins.helpers import logits, probe, receipt, verdict


@pytest.mark.parametrize(
    ("family", "implementation"), [("llama", "sdpa"), ("gpt2", "sdpa"), ("bloom", "eager")]
)
def test_it_tells_what_transformers_chose(build: Build, family: str, implementation: str) -> None:
    found = receipt(build(family=family), "attention")
    assert found.ok
    assert found.evidence["implementation"] == implementation


def test_it_names_nothing() -> None:
    assert NativeAttention().attention(AttentionContext(config=tiny_config("llama"))) == Attention()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_with_a_bias_it_is_the_formula_in_plain_torch(build: Build, family: str) -> None:
    """Gemma 2 and gpt-oss have no SDPA, which could do neither their caps nor their sinks."""
    session = build("position_encoding=alibi", family=family)
    found = receipt(session, "attention").evidence
    assert int(found["softmax operators"]) >= 4
    assert found["fused attention operators"] == 0
    eager = build("position_encoding=alibi", "attention=eager", family=family)
    assert logits(session.model).equal(logits(eager.model))


def test_no_attention_is_no_proof(build: Build) -> None:
    assert not verdict(NativeAttention(), build(), probe=probe({"aten::mm": 5}))
