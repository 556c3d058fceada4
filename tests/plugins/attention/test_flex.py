"""attention=flex is refused where torch cannot compile it, and right where it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine import compose
from engine.errors import RecipeError
from engine.plugins.attention.flex import Flex
from engine.verdict import check
from tests.conftest import Build
from tests.plain import greedy
from tests.plugins.helpers import IDS, logits, plain, receipt, relative, verdict

MODEL_ONLY = {trait: rule for trait, rule in Flex.needs.items() if trait != "target.cuda"}


def test_a_cpu_is_refused_before_loading(build: Build) -> None:
    with pytest.raises(RecipeError, match="inductor") as caught:
        build("attention=flex", "target=cpu")
    assert [problem.code for problem in caught.value.problems] == ["flex-cpu"]


def test_the_target_decides(build: Build) -> None:
    folder = build().recipe.model.path
    words = [f"model.path={folder}", "attention=flex", "target=a100-40gb"]
    assert check(compose("base", words)).ok
    found = check(compose("base", [*words, "cache=static"])).problems
    assert [problem.code for problem in found] == ["flex-static-cache"]


def test_models_without_it_are_refused(build: Build) -> None:
    with pytest.raises(RecipeError) as caught:
        build("attention=flex", family="gpt2")
    assert {problem.code for problem in caught.value.problems} == {"flex-model", "flex-cpu"}


@pytest.mark.slow
def test_compiled_tokens_equal_those_of_eager(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt without padding is what a CPU's compiler manages: half a minute the first time."""
    monkeypatch.setattr(Flex, "needs", MODEL_ONLY)
    session = build("attention=flex", "decode.max_new_tokens=8")
    folder = Path(session.recipe.model.path)
    ids: Any = session.tokenizer("def add(a, b):")["input_ids"]
    assert session.generate("def add(a, b):").token_ids == greedy(folder, ids, 8)
    evidence = receipt(session, "attention").evidence
    assert evidence["calls"] == evidence["of them with a block mask"] == 4  # two layers, two passes
    session.built["attention"].forward.__self__.blocks -= 1
    assert not verdict(Flex(), session)


def test_another_attention_is_no_proof(build: Build) -> None:
    assert not verdict(Flex(), build("attention=sdpa"))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2"])
def test_logits_equal_those_of_eager_on_a_gpu(build: Build, family: str) -> None:
    session = build("attention=flex", family=family)
    reference = logits(plain(Path(session.recipe.model.path)))
    found = logits(session.model, IDS.to(session.device)).cpu()
    assert relative(found, reference) < 1e-2  # tf32 in triton's products
    assert session.generate(["def add(a, b):", "x"])
