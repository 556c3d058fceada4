"""The verdict: what no single plugin could know, traits, and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from engine import hookimpl, recipe, verdict
from engine.contexts import EstimateContext, Term
from engine.errors import CheckpointError, DoesNotFit, RecipeError
from engine.recipe import Recipe

ModelFolder = Callable[[str], Path]


def _compose(folder: Path, *overrides: str) -> Recipe:
    return recipe.compose("base", [f"model.path={folder}", *overrides])


def test_a_good_recipe_has_no_problems(model: ModelFolder) -> None:
    found = verdict.check(_compose(model("llama")))
    assert found.ok
    assert found.shape is not None
    assert found.shape.layers == 2
    found.raise_for_problems()


@dataclass
class Needing:
    """Need what nobody provides, and exclude what is there."""

    needs: ClassVar[dict[str, str]] = {"cache.telepathic": "cache=dynamic"}
    excludes: ClassVar[dict[str, str]] = {"model.rope": "another model"}


def test_traits_are_held_against_each_other(model: ModelFolder) -> None:
    made = _compose(model("llama"))
    made.attention = Needing()
    found = verdict.check(made)
    assert [problem.code for problem in found.problems] == ["trait-missing", "trait-excluded"]
    assert "cache=dynamic" in found.problems[0].hint
    assert "the model" in found.problems[1].message


def test_bfloat16_is_refused_where_there_is_none(model: ModelFolder) -> None:
    found = verdict.check(_compose(model("llama"), "target=t4", "model.dtype=bfloat16"))
    assert found.problems[0].hint == "model.dtype=float16"


def test_remote_code_wants_a_pinned_revision(model: ModelFolder) -> None:
    found = verdict.check(_compose(model("llama"), "model.trust_remote_code=true"))
    assert "model.revision=COMMIT" in found.problems[0].hint


def test_a_decoder_without_limit_is_refused(model: ModelFolder) -> None:
    made = _compose(model("llama"))
    made.decode = Needing()
    with pytest.raises(RecipeError, match="max_new_tokens"):
        verdict.check(made).raise_for_problems()


@dataclass
class Greedy:
    """Want all the memory in the world."""

    @hookimpl
    def estimate(self, context: EstimateContext) -> list[Term]:
        """Ask for a lot."""
        return [Term(name="appetite", bytes=10**15)]


def test_what_does_not_fit_is_refused_with_its_terms(model: ModelFolder) -> None:
    made = _compose(model("llama"))
    made.observe = Greedy()
    with pytest.raises(DoesNotFit, match=r"appetite 931322.57[\s\S]*quantize="):
        verdict.check(made).raise_for_problems()


def test_an_answer_is_priced_to_the_end_of_the_context(model: ModelFolder) -> None:
    prices = [
        verdict.check(_compose(model("llama"), f"decode.max_new_tokens={tokens}")).terms
        for tokens in (128, 100_000_000)
    ]
    assert prices[0] == prices[1]


def test_a_broken_config_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        verdict.check(_compose(tmp_path)).raise_for_problems()


def test_a_model_that_is_not_here_is_not_judged() -> None:
    found = verdict.check(recipe.compose("base", ["model.path=some-org/some-model"]))
    assert found.ok
    assert found.shape is None


@pytest.mark.parametrize(
    ("family", "overrides", "says"),
    [
        ("bloom", ["attention=sdpa"], "attention=eager"),
        ("gpt2", ["heads=grouped"], "heads=native"),
        ("gpt2", ["position_encoding=yarn"], "position_encoding=native"),
        ("llama", ["heads=grouped", "heads.num_key_value_heads=3"], "num_key_value_heads"),
        ("llama", ["heads=grouped", "heads.num_key_value_heads=2"], "heads=native"),
    ],
)
def test_a_choice_that_the_model_cannot_have_is_refused(
    model: ModelFolder, family: str, overrides: list[str], says: Any
) -> None:
    found = verdict.check(_compose(model(family), *overrides))
    assert not found.ok
    assert says in found.problems[0].hint + found.problems[0].message
