"""The verdict: what no single plugin could know, traits, and memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from engine import hookimpl, recipe, verdict
from engine.contexts import ConfigureContext, EstimateContext, ModelConfig, ReshapeContext, Term
from engine.errors import CheckpointError, DoesNotFit, PluginError, RecipeError
from engine.loading import checkpoint
from engine.recipe import Recipe
from engine.rules import Rule
from engine.shape import ModelShape
from engine.target import Target
from tests.models import CONTEXT
from tests.plugins.helpers import priced

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
    assert found.problems[0].hint.startswith("attention=")  # its own, cache=dynamic, does not do
    assert "the model" in found.problems[1].message


RULE = Rule(
    code="words-and-rotation",
    why="words turn sour when rotated",
    hint="another model",
    source="a wise woman",
    seen="wisdom 1.0, 2026-11-22",
)


@dataclass
class Ruled:
    """Exclude what is there, and say who says so; need what only a model could have."""

    excludes: ClassVar[dict[str, Rule]] = {"model.rope": RULE}
    needs: ClassVar[dict[str, str]] = {"model.wings": "another model"}


def test_a_rule_is_refused_with_its_source(model: ModelFolder) -> None:
    made = _compose(model("llama"))
    made.attention = Ruled()
    missing, ruled = verdict.check(made).problems
    assert missing.code == "trait-missing"
    assert ruled.code == RULE.code
    assert RULE.why in ruled.message
    assert "a wise woman (wisdom 1.0, 2026-11-22)" in str(ruled)


def test_what_a_model_lacks_is_not_known_before_its_config_is_here() -> None:
    made = recipe.compose("base", ["model.path=some-org/some-model"])
    made.attention = Ruled()
    assert verdict.check(made).ok


@dataclass
class Telling:
    """Load from files that tell the config themselves."""

    layers: int = 5

    @hookimpl
    def configure(self, context: ConfigureContext) -> ModelConfig:
        """Change a number of config.json, and say so."""
        config = checkpoint.read_config(context.folder) | {"num_hidden_layers": self.layers}
        return ModelConfig(config=config, notes=["five it is"])


def test_what_loads_may_say_what_the_config_is(model: ModelFolder) -> None:
    made = _compose(model("llama"))
    made.load = Telling()
    found = verdict.check(made)
    assert found.shape is not None
    assert found.shape.layers == 5
    assert found.notes[0] == "five it is"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Telling, "configure", hookimpl(lambda self, context: None))
        told = verdict.check(made)
    assert told.shape is not None
    assert told.shape.layers == 2
    made.attention = Telling()
    with pytest.raises(PluginError, match="hook configure: only the plugin in the slot load may"):
        verdict.check(made)


@pytest.mark.parametrize("answer", [{"hidden_size": 3}, ModelConfig(config={}, notes="none")])
def test_a_config_of_another_type_is_blamed(model: ModelFolder, answer: Any) -> None:
    made = _compose(model("llama"))
    made.load = Telling()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Telling, "configure", hookimpl(lambda self, context: answer))
        with pytest.raises(PluginError, match="hook configure: gave"):
            verdict.check(made)


@dataclass
class Longer:
    """Make the context longer."""

    by: int = 1

    @hookimpl
    def reshape(self, context: ReshapeContext) -> ModelShape:
        """Add to what those before made of it."""
        assert context.shape.max_positions is not None
        return replace(context.shape, max_positions=context.shape.max_positions + self.by)


def test_choices_reshape_the_model_one_after_the_other(model: ModelFolder) -> None:
    made = _compose(model("llama"))
    made.attention, made.observe = Longer(1), Longer(10)
    found = verdict.check(made).shape
    assert found is not None
    assert found.max_positions == CONTEXT + 11


def test_a_reshape_of_another_type_is_blamed(model: ModelFolder) -> None:
    made = _compose(model("llama"))
    made.observe = Longer()
    answer: Any = 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Longer, "reshape", hookimpl(lambda self, context: answer))
        with pytest.raises(PluginError, match=r"reshape.*gave a int"):
            verdict.check(made)


def test_another_target_is_judged_instead(model: ModelFolder) -> None:
    made = _compose(model("llama"), "target=h100", "model.dtype=bfloat16")
    assert verdict.check(made).ok
    old = Target(name="old", kind="cuda", capability="7.5", usable_gib=15)
    found = verdict.check(made, target=old)
    assert [problem.code for problem in found.problems] == ["dtype"]


def test_bfloat16_is_refused_where_there_is_none(model: ModelFolder) -> None:
    found = verdict.check(_compose(model("llama"), "target=t4", "model.dtype=bfloat16"))
    assert found.problems[0].hint == "model.dtype=float16"
    stored = recipe.compose("base", ["model=llama-3.1-8b", "quantize=nf4", "target=t4"])
    (problem,) = verdict.check(stored).problems
    assert "in which the model is stored" in problem.message
    assert verdict.check(recipe.compose("base", ["model=llama-3.1-8b", "target=l4"])).ok


def test_a_config_without_a_number_format_is_read_as_the_builder_does(tmp_path: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for target, size in (("cpu", 4), ("l4", 2)):
        pricer = verdict.check(_compose(tmp_path, f"target={target}")).pricer
        assert pricer is not None
        assert pricer.prompt(1, 8, 1).context.value_bytes == size


def test_a_model_that_continues_no_text_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "t5", "vocab_size": 64, "d_model": 64, "num_layers": 2, "num_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (problem,) = verdict.check(_compose(tmp_path)).problems
    assert problem.code == "not-causal"


@pytest.mark.parametrize(
    ("architecture", "refused"),
    [
        ("BertForMaskedLM", "fills gaps in a text"),
        ("Qwen2ForSequenceClassification", "sorts texts into classes"),
        ("LlamaForTokenClassification", "sorts words into classes"),
        ("LlamaForCausalLM", ""),
        ("GPT2LMHeadModel", ""),
        ("LlavaForConditionalGeneration", ""),
    ],
)
def test_what_was_made_for_another_task_is_named(
    model: ModelFolder, tmp_path: Path, architecture: str, refused: str
) -> None:
    config = json.loads((model("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    found = verdict.check(_compose(tmp_path)).problems
    assert [each.code for each in found] == ["not-causal"] * bool(refused)
    assert all(refused in each.message for each in found)


@pytest.mark.parametrize("given", [r"decode.stop=['\n\n', 'x\ny']", r"task.prefix='a\tb'"])
def test_escapes_that_are_none_are_told(model: ModelFolder, given: str) -> None:
    found = verdict.check(_compose(model("llama"), given))
    assert [note for note in found.notes if "a backslash and a letter" in note] or found.problems
    assert not verdict.check(_compose(model("llama"), "decode.stop=['n\n']")).notes


def test_a_prompt_without_room_for_an_answer_is_refused(model: ModelFolder) -> None:
    folder = model("llama")
    for words, whose in (([], "the model"), (["cache=static", "cache.max_tokens=32"], "the cache")):
        end = 32 if words else CONTEXT
        made = _compose(folder, *words, f"workload.prompt_tokens={end}", "decode.max_new_tokens=4")
        (problem,) = verdict.check(made).problems
        assert f"{whose} has room for {end} tokens" in problem.message
        assert problem.hint == f"workload.prompt_tokens={end - 4}"
        assert verdict.check(_compose(folder, *words, problem.hint, "decode.max_new_tokens=4")).ok


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
    with pytest.raises(DoesNotFit, match=r"appetite 931322.57[\s\S]*`engine plan`"):
        verdict.check(made).raise_for_problems()


def test_an_answer_is_priced_to_the_end_of_the_context(model: ModelFolder) -> None:
    prices = [
        priced(verdict.check(_compose(model("llama"), f"decode.max_new_tokens={tokens}")))
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


def test_an_answer_longer_than_the_context_is_noted(model: ModelFolder) -> None:
    notes = [
        verdict.check(_compose(model("llama"), f"decode.max_new_tokens={tokens}")).notes
        for tokens in (CONTEXT, CONTEXT + 1)
    ]
    assert notes[0] == []
    assert "answers end there" in notes[1][0]
