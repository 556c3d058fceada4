"""attention=eager is the reference itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from engine.plugins.attention.eager import Eager
from tests.conftest import Build
from tests.plugins.helpers import hints, logits, plain, probe, receipt, relative, shape_of, verdict


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_bigcode", "bloom"])
def test_logits_are_those_of_plain_transformers(build: Build, family: str) -> None:
    session = build("attention=eager", family=family)
    assert logits(session.model).equal(logits(plain(Path(session.recipe.model.path))))
    found = receipt(session, "attention")
    assert found.evidence["softmax operators"] == 4  # two layers, two passes
    assert found.evidence["fused attention operators"] == 0


def test_falcon_with_alibi_is_refused(model: Callable[[str], Path]) -> None:
    assert hints(Eager(), shape_of(model("falcon"))) == ["attention=sdpa"]
    assert hints(Eager(), shape_of(model("falcon-rotary"))) == hints(Eager()) == []


@pytest.mark.skipif(not transformers.__version__.startswith("5.23."), reason="seen in 5.23")
def test_falcon_with_alibi_is_still_wrong(model: Callable[[str], Path]) -> None:
    """When this fails, transformers was mended, and the refusal can name the versions."""
    folder = model("falcon")
    fused = logits(plain(folder, attn_implementation="sdpa"))
    assert relative(logits(plain(folder)), fused) > 0.01


def test_a_fused_kernel_contradicts_it(build: Build) -> None:
    session = build("attention=eager")
    fused = {"aten::_softmax": 4, "aten::_scaled_dot_product_flash_attention_for_cpu": 4}
    assert verdict(Eager(), session)
    assert not verdict(Eager(), session, probe=probe(fused))
    assert not verdict(Eager(), session, probe=probe({"aten::_safe_softmax": 4}))
    assert not verdict(Eager(), build("attention=sdpa"))
