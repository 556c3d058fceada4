"""No hint leads to the next refusal: what a refusal says to type has been tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import engine
from engine.composing.changing import changed
from engine.errors import EngineError, Problem, RecipeError
from engine.hints import overrides_in, tried
from engine.recipe import Recipe
from tests import matrix

BROKEN = (
    "decode.max_new_tokens=0", "decode.temperature=-1", "decode.temperature=200", "decode.top_k=5",
    "decode.top_p=2", "decode.min_p=0", "decode.repetition_penalty=0", "seed=-1",
    "decode.stop=['']", "task.prefix=''", "workload.batch=0", "workload.prompt_tokens=0",
    "workload.prompt_tokens=500", "target=t4 model.dtype=bfloat16",
    "quantize=bitsandbytes quantize.bits=3",
    "quantize=bitsandbytes quantize.bits=8 quantize.double_quant=true",
    "quantize=quanto quantize.bits=2", "cache=static cache.max_tokens=0",
    "cache=static cache.max_tokens=100000", "cache=sliding cache.window=0",
    "cache=sinks cache.sinks=0", "cache=quantized cache.bits=3",
    "attention=window attention.size=0", "attention=window attention.size=5000",
    "attention=sinks attention.sinks=0", "attention=chunked attention.query_block=0",
    "position_encoding=yarn position_encoding.factor=1",
    "position_encoding=yarn position_encoding.beta_fast=0",
    "position_encoding=self-extend position_encoding.group_size=1",
    "position_encoding=self-extend position_encoding.window=500",
    "position_encoding=learned position_encoding.factor=1",
    "position_encoding=sinusoidal position_encoding.max_positions=5",
    "heads=grouped heads.num_key_value_heads=3", "heads=grouped heads.num_key_value_heads=100",
    "decode=beam decode.num_beams=1", "decode=prompt-lookup decode.num_draft_tokens=0",
    "load.device_map=auto", "load.device_map=disk", "decode=compiled",
    "decode=compiled cache=sliding", "attention=flash", "attention=flex", "cache=offloaded",
    "target=h100 attention=flash",
)  # fmt: skip
Folder = Callable[[str], Path]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Leave the checkout alone: observe=trace writes into the current folder."""
    monkeypatch.chdir(tmp_path)


def test_a_line_for_the_shell_is_not_tried() -> None:
    assert overrides_in("""let the shell make it: $'decode.stop=["\\n"]'""") == []


def wrong(words: Sequence[str]) -> dict[tuple[str, str, str], Problem]:
    """Return what `check` says of the base recipe with these overrides."""
    problems = engine.check(engine.compose("base", words)).problems
    return {(each.slot, each.code, each.message): each for each in problems}


def following(words: Sequence[str], said: Sequence[str]) -> list[str]:
    """Return what somebody types who follows: options go with the choice that they belong to."""
    keys = [word.partition("=")[0] for word in said]
    kept = [
        word
        for word in words
        if (key := word.partition("=")[0]) not in keys
        and not any(key.startswith(f"{other}.") for other in keys)
    ]
    return [*kept, *said]


def follow_all(words: Sequence[str]) -> int:
    """Follow every hint to a refused recipe, and return how many there were."""
    before, count = wrong(words), 0
    for key, problem in before.items():
        for said in overrides_in(problem.hint):
            after = wrong(following(words, said))
            assert key not in after, f"{problem.message}: {said} changes nothing"
            assert not after.keys() - before.keys(), f"{problem.message}: {said} is refused"
            count += 1
    return count


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "bloom",
        *(
            pytest.param(family, marks=pytest.mark.slow)
            for family in ("gpt2", "deepseek_v3", "gemma2")
        ),
    ],
)
def test_following_a_hint_leads_to_no_refusal(model: Folder, family: str) -> None:
    start = [f"model.path={model(family)}", "model.dtype=float32"]
    assert sum(follow_all([*start, *broken.split(" ")]) for broken in BROKEN) > len(BROKEN)


def cell_words(cell: matrix.Cell, model: Folder) -> list[str]:
    words = [word for variant in cell.variants for word in variant.words]
    values = {"factors": "[2.0,3.0]", "ones": "[1.0,1.0]", "draft": str(model("llama"))}
    words = [word.format(**values) if "{" in word else word for word in words]
    return [f"model.path={model(cell.family)}", "model.dtype=float32", *words]


def test_following_hints_of_pairs_of_choices_leads_to_none(model: Folder) -> None:
    assert sum(follow_all(cell_words(cell, model)) for cell in matrix.sample(25)) > 10


@pytest.mark.slow
def test_following_hints_of_many_pairs_leads_to_none(model: Folder) -> None:
    assert sum(follow_all(cell_words(cell, model)) for cell in matrix.sample(1500)) > 700


# -- trying ---------------------------------------------------------------------------------------


@dataclass
class Judge:
    """Find nothing wrong with one choice of attention, and everything with the others."""

    fine: str

    def __call__(self, recipe: Recipe) -> list[Problem]:
        choice = recipe.choices["attention"]
        if choice == self.fine:
            return []
        return [Problem(message=f"attention={choice}: no", hint="", code="no", slot="attention")]


@pytest.mark.parametrize(
    ("hint", "fine", "expected"),
    [
        ("attention=eager", "eager", "attention=eager"),
        ("attention=sdpa", "eager", "attention=eager"),
        ("attention=sdpa, or attention=eager", "eager", "attention=eager"),
        ("attention=sdpa; or attention=eager, slow", "eager", "attention=eager, slow"),
        ("attention=sdpa, or another target: engine list target", "eager",
         "attention=eager, or another target: engine list target"),
        ("attention=sdpa", "none of them",
         "no other choice for one slot mends it: change attention together"),
        ("pip install something", "eager", "pip install something"),
        ("model.path=FOLDER", "eager", "model.path=FOLDER"),
    ],
)  # fmt: skip
def test_what_would_be_refused_is_left_out(hint: str, fine: str, expected: str) -> None:
    recipe = engine.compose("tiny", ["attention=chunked"])
    problem = Problem(message="attention=chunked: no", hint=hint, code="no", slot="attention")
    (found,) = tried(recipe, [problem], Judge(fine))
    assert found.hint == expected
    assert (found.message, found.code) == (problem.message, problem.code)


def test_what_leaves_the_problem_as_it_was_is_left_out() -> None:
    recipe = engine.compose("tiny")
    lasting = Problem(message="the seed is no matter", hint="seed=3", code="no", slot="attention")
    other = Problem(message="another", hint="seed=4", code="no", slot="cache")

    def still(changed: Recipe) -> list[Problem]:
        return [lasting]

    found = tried(recipe, [lasting, other], still)
    assert "seed=3" not in found[0].hint
    assert found[1].hint == "seed=4", "the others may stay: they have hints of their own"


def test_overrides_are_found_in_words() -> None:
    assert overrides_in("cache=none, or position_encoding=yarn, which never changes") == [
        ("cache=none",), ("position_encoding=yarn",)
    ]  # fmt: skip
    assert overrides_in("model.trust_remote_code=true model.revision=COMMIT") == []
    assert overrides_in("quantize.skip_modules=[a,b.c] (mends it); or cache.window=16.") == [
        ("quantize.skip_modules=[a,b.c]",), ("cache.window=16",)
    ]  # fmt: skip
    assert overrides_in("pip install 'torchao>=0.15'") == []


# -- changing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["attention=chunked", "attention.query_block=8"],
        ["quantize=nf4"],
        ["cache=static", "cache.max_tokens=99", "decode.stop=[a,b]"],
        ["target=l4", "workload.batch=3", "seed=7", "model.dtype=bfloat16"],
        ["decode=beam", "decode.num_beams=3", "decode.max_new_tokens=5"],
        ["model=octocoder"],
    ],
)
def test_a_changed_recipe_is_the_one_that_is_composed_so(words: list[str]) -> None:
    made, composed = changed(engine.compose("tiny"), words), engine.compose("tiny", words)
    for key in (*composed.choices, "model", "target", "workload", "seed"):
        if key != "model" or "model" not in composed.choices:
            assert getattr(made, key) == getattr(composed, key), key
    assert made.choices == composed.choices


@pytest.mark.parametrize(
    "word", ["attention=nothing", "attention.nothing=1", "target=nothing", "seed==", "observe.a=1"]
)
def test_what_cannot_be_changed_is_refused(word: str) -> None:
    with pytest.raises((RecipeError, EngineError)):
        changed(engine.compose("tiny"), [word])
