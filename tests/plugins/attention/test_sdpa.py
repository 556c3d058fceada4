"""attention=sdpa is one fused operator per layer, equal to eager but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import RecipeError
from engine.plugins.attention.sdpa import Sdpa
from tests.conftest import Build
from tests.plugins.helpers import (
    hints,
    logits,
    plain,
    probe,
    receipt,
    refusals,
    relative,
    shape_of,
    verdict,
)

KERNEL = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "gpt_bigcode"])
def test_logits_equal_those_of_eager(build: Build, family: str) -> None:
    session = build("attention=sdpa", family=family)
    reference = logits(plain(Path(session.recipe.model.path)))
    assert relative(logits(session.model), reference) < 1e-5  # float32 rounding


def test_the_receipt_names_the_kernel_and_counts_it(build: Build) -> None:
    evidence = receipt(build("attention=sdpa"), "attention").evidence
    assert evidence["kernels"] == KERNEL
    assert (evidence["calls"], evidence["layers"], evidence["forward passes"]) == (4, 2, 2)


def test_what_ran_too_seldom_or_not_at_all_is_no_proof(build: Build) -> None:
    session = build("attention=sdpa")
    assert verdict(Sdpa(), session, probe=probe({KERNEL: 4}))
    assert verdict(Sdpa(), session, probe=probe({"aten::_safe_softmax": 4}))
    assert not verdict(Sdpa(), session, probe=probe({KERNEL: 3}))
    assert not verdict(Sdpa(), session, probe=probe({"aten::_softmax": 4}))
    assert not verdict(Sdpa(), session, probe=probe({KERNEL: 4}, tokens=()))
    assert not verdict(Sdpa(), build("attention=eager"))


def test_models_without_it_are_refused(build: Build, model: Callable[[str], Path]) -> None:
    bloom = shape_of(model("bloom"))
    assert hints(Sdpa(), bloom) == ["attention=eager"]
    capped = replace(bloom, traits=frozenset({"model.softcap"}))
    assert "caps attention scores" in refusals(Sdpa(), capped)[0].message
    assert hints(Sdpa(), shape_of(model("llama"))) == hints(Sdpa(), None) == []
    with pytest.raises(RecipeError, match="plain torch only"):
        build("attention=sdpa", family="bloom")
