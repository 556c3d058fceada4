"""attention=eager is the reference itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from engine.attending.masks import with_bias
from engine.contexts import AttentionContext
from engine.plugins.attention.eager import Eager
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


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_bigcode", "bloom"])
def test_logits_are_those_of_plain_transformers(build: Build, family: str) -> None:
    session = build("attention=eager", family=family)
    assert logits(session.model).equal(logits(plain(Path(session.recipe.model.path))))
    found = receipt(session, "attention")
    assert found.evidence["softmax operators"] == 4  # two layers, two passes
    assert found.evidence["fused attention operators"] == 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "gpt2", "deepseek_v3"])
def test_its_own_formula_is_that_of_every_model(build: Build, family: str) -> None:
    """A bias of nothing: what the engine's forward computes, the model's own code does as well."""
    folder = Path(build(family=family).recipe.model.path)
    reference = plain(folder)
    nothing: Any = lambda queries, keys: torch.zeros(1, 4, len(queries), len(keys))  # noqa: E731
    made = Eager().attention(AttentionContext(config=reference.config, bias=nothing))
    AttentionInterface.register("own", made.forward)
    AttentionMaskInterface.register("own", with_bias(made.mask, nothing))
    try:
        own = plain(folder, attn_implementation="own")
        assert relative(logits(own), logits(reference)) < 1e-6
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            del interface._global_mapping["own"]


def test_the_receipt_tells_whose_code_it_was(build: Build) -> None:
    assert receipt(build("attention=eager"), "attention").evidence["code"] == "the model's own"
    session = build("attention=eager", "position_encoding=alibi")
    found = receipt(session, "attention").evidence
    assert (found["code"], found["softmax operators"]) == ("the engine's", 4)


def test_falcon_with_alibi_is_refused(model: Callable[[str], Path]) -> None:
    """That it is still wrong, `tests/rules` tries."""
    (problem,) = refusals(Eager(), shape_of(model("falcon")))
    assert (problem.code, problem.hint) == ("falcon-alibi-eager", "attention=sdpa")
    assert "modeling_falcon.py" in problem.source
    assert hints(Eager(), shape_of(model("falcon-rotary"))) == hints(Eager()) == []


def test_a_fused_kernel_contradicts_it(build: Build) -> None:
    session = build("attention=eager")
    fused = {"aten::_softmax": 4, "aten::_scaled_dot_product_flash_attention_for_cpu": 4}
    assert verdict(Eager(), session)
    assert not verdict(Eager(), session, probe=probe(fused))
    assert not verdict(Eager(), session, probe=probe({"aten::_safe_softmax": 4}))
    assert not verdict(Eager(), build("attention=sdpa"))
