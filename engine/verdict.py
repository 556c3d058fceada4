"""Say what is wrong with a recipe before anything loads, and without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.calls import Chosen
from engine.contexts import CheckContext, ConfigureContext, ReshapeContext
from engine.errors import (
    CheckpointError,
    DoesNotFit,
    EngineError,
    PluginError,
    Problem,
    RecipeError,
)
from engine.families import family
from engine.hooks import Hooks
from engine.loading import checkpoint
from engine.loading.checkpoint import TensorInfo
from engine.loading.known_models import known_config
from engine.loading.model_folder import is_local
from engine.planning.calibration import known
from engine.planning.passes import Pricer, limit
from engine.recipe import Recipe, slots
from engine.rules import Rule
from engine.shape import ModelShape, read_shape
from engine.target import Target, resolve

OWN_CACHE = Rule(
    code="own-cache",
    why="its code takes no cache of transformers: what it remembers of earlier tokens it keeps in "
    "a form of its own, or in its modules, or not at all",
    hint="cache=none, which sends all tokens again for each new one",
    source="forward of its causal model in transformers, which takes neither past_key_values nor "
    "cache_params, or never writes its states there",
    seen="transformers 5.23.0, 2026-11-28",
)

_OTHER = {
    "SequenceClassification": "sorts texts into classes",
    "TokenClassification": "sorts words into classes",
    "QuestionAnswering": "finds answers in a text",
    "MultipleChoice": "chooses among answers",
    "MaskedLM": "fills gaps in a text",
}
"""Ends of class names → what such a model does."""

HOPELESS = {"cache.static": ("model.own_cache", "model.own_layers", "model.bias_by_mask")}
"""Trait → traits of models for which nothing can provide it: who needs it excludes these."""


@dataclass(frozen=True)
class Verdict:
    """What `check` found."""

    recipe: Recipe
    hooks: Hooks
    target: Target
    shape: ModelShape | None
    """As the choices will leave it; None when the model is not on this machine yet."""
    problems: list[Problem]
    pricer: Pricer | None = None
    """What prices passes of it; None where the model's sizes are not known."""
    error: type[EngineError] = RecipeError
    """What `raise_for_problems` raises."""
    notes: list[str] = field(default_factory=list)
    """What works, and perhaps not well."""

    @property
    def ok(self) -> bool:
        """Tell whether the recipe can be built, as far as can be known."""
        return not self.problems

    def raise_for_problems(self) -> None:
        """Raise what was found wrong.

        Raises:
            RecipeError, CheckpointError, DoesNotFit: the kind that comes first in this list.
        """
        if self.problems:
            raise self.error(self.problems)


def check(recipe: Recipe, *, target: Target | None = None) -> Verdict:
    """Judge a recipe by its options, the model's shape, and the target.

    What its problems say to type instead has been tried.

    Args:
        target: another one than the recipe's, as the machine where it is about to be built.

    Raises:
        PluginError: when a plugin breaks the hook contract.
    """
    found = judge(recipe, target=target)
    if not found.problems:
        return found
    from engine.hints import tried  # composing, which it needs, is not always needed
    from engine.quantizing import trial

    def wrong(other: Recipe) -> list[Problem]:
        with trial.paused():  # trials take seconds, and what is wrong anyway needs none
            changed = judge(other, target=target)
        if changed.ok:
            changed = judge(other, target=target)
        # Whether it fits is asked of recipes that are right otherwise; to make it so is a step on.
        later = changed.error is DoesNotFit and found.error is not DoesNotFit
        return [] if later else changed.problems

    return replace(found, problems=tried(recipe, found.problems, wrong))


def judge(recipe: Recipe, *, target: Target | None = None) -> Verdict:
    """Judge a recipe as `check` does, and leave untried what its problems say to type instead."""
    hooks = Hooks(
        Chosen(slot, recipe.choices.get(slot, slot), plugin)
        for slot, plugin in slots(recipe).items()
    )
    target = resolve(recipe.target if target is None else target)
    shape, broken, told = find_shape(recipe, hooks)
    reshaped = shape and hooks.reshape(ReshapeContext(recipe=recipe, shape=shape))
    traits = _traits(hooks, shape, target)
    context = CheckContext(
        recipe=recipe, shape=shape, reshaped=reshaped, target=target, traits=frozenset(traits)
    )
    broken += _not_causal(shape)
    problems = [*_own(context), *_unmet(hooks, traits, context)]
    try:
        problems += hooks.check(context)
    except CheckpointError as error:  # whether the weights are needed, and fit, `load` knows
        broken = [*broken, *error.problems]
    ruled_out = {problem.slot: problem for problem in _ruled_out(context)}
    problems = [*ruled_out.values(), *(one for one in problems if one.slot not in ruled_out)]
    pricer = None
    if reshaped is not None:
        try:
            pricer = known(Pricer(recipe, hooks, reshaped, target, None))
        except PluginError:
            if not (problems or broken):
                raise  # else options that are refused have no price
    if problems or broken:
        kind = RecipeError if problems else CheckpointError
        return Verdict(recipe, hooks, target, reshaped, [*problems, *broken], pricer, kind)
    # How much of a model that is spread lies on which device, accelerate decides when it loads.
    spread = {"load.offloaded", "load.dispatched"} & traits.keys()
    excess = [] if spread or pricer is None else pricer.refusal()
    notes = [*told, *_notes(hooks, traits), *_context(context), *_escapes(recipe)]
    if shape is not None and shape.misleading:
        notes.append(
            f"the code of {shape.model_type} does not read {', '.join(shape.misleading)} of "
            "config.json: planned and run as if not there"
        )
    if reshaped is not None and not reshaped.weighed:
        notes.append("what its weights take is not known before they are on this machine")
    return Verdict(recipe, hooks, target, reshaped, excess, pricer, DoesNotFit, notes)


def find_shape(
    recipe: Recipe, hooks: Hooks
) -> tuple[ModelShape | None, list[Problem], Sequence[str]]:
    """Return the checkpoint's shape (None: not known, or broken), what is wrong, and notes.

    Where config.json is not on this machine, the recipe's own `model.config` tells, or that of a
    model with the same path that recipes know.
    """
    try:
        folder = checkpoint.locate(recipe.model.path, recipe.model.revision, download=False)
        if folder is None:
            stated = recipe.model.config or known_config(recipe.model.path)
            return (read_shape(stated) if stated else None), [], ()
        told = hooks.configure(ConfigureContext(recipe=recipe, folder=folder))
        there = (folder / "config.json").is_file() or is_local(recipe.model.path)
        if told is None and not there:  # other files of a hub model are here than are asked for
            return None, [], ()
        config = checkpoint.read_config(folder) if told is None else told.config
        return read_shape(config, _tensors(folder)), [], () if told is None else told.notes
    except CheckpointError as error:
        return None, error.problems, ()


def _not_causal(shape: ModelShape | None) -> Iterable[Problem]:
    """Refuse a model that continues no text."""
    found = None if shape is None else family(shape.model_type)
    other = None if shape is None else _OTHER.get(shape.architecture.rpartition("For")[2])
    if shape is not None and other is not None:
        yield Problem(
            message=f"config.json says {shape.architecture}: a model that {other}, and "
            "continues no text",
            hint="take another model, one with ...ForCausalLM: model.path=FOLDER_OR_HUB_ID",
            code="not-causal",
        )
    elif shape is not None and found is not None and found.known and not found.causal:
        yield Problem(
            message=f"transformers has no model of {shape.model_type} that continues text "
            "(AutoModelForCausalLM)",
            hint="take another model, a decoder: model.path=FOLDER_OR_HUB_ID, or model=NAME "
            "(engine list model)",
            code="not-causal",
        )


def _tensors(folder: Path) -> Mapping[str, TensorInfo]:
    # Sizes for the estimates. Whether the weights are needed, and sound, is for `load` to say.
    try:
        return checkpoint.tensors(folder)
    except CheckpointError:
        return {}


def _traits(hooks: Hooks, shape: ModelShape | None, target: Target) -> dict[str, str]:
    """Return each trait, and who provides it."""
    found = dict.fromkeys(target.traits, f"target={target.name}")
    found |= dict.fromkeys(shape.traits if shape else (), "the model")
    for one in hooks.chosen:
        for trait in getattr(one.plugin, "provides", ()):
            found[trait] = f"{one.slot}={one.choice}"
    return found


def _unmet(hooks: Hooks, traits: Mapping[str, str], context: CheckContext) -> Iterable[Problem]:
    for one in hooks.chosen:
        name = f"{one.slot}={one.choice}"
        for trait, why in getattr(one.plugin, "needs", {}).items():
            if not traits.keys().isdisjoint(HOPELESS.get(trait, ())):
                continue  # told as excluded
            if trait not in traits and _is_known(trait, context):
                what = f"{name} needs {trait}, and nothing chosen provides it"
                yield _refusal(one.slot, "trait-missing", what, why)
        for trait, why in getattr(one.plugin, "excludes", {}).items():
            if trait in traits:
                what = f"{name} does not work with {trait}, which {traits[trait]} provides"
                yield _refusal(one.slot, "trait-excluded", what, why)


def _context(context: CheckContext) -> Iterable[str]:
    """Note a context that is not what config.json states, and answers that go beyond its end."""
    shape = context.shape
    if shape and shape.position == "rope" and shape.max_positions != shape.stated_positions:
        yield (
            f"config.json states {shape.stated_positions:,} positions, and "
            + (
                f"stretches them to {shape.max_positions:,} (rope_type {shape.rope_type})"
                if shape.rope_type != "default"
                else f"{shape.max_positions:,} as the longest text: that counts"
            )
        )
    asked = getattr(context.recipe.decode, "max_new_tokens", 0)
    end = limit(context.recipe, context.reshaped) if context.reshaped else None
    if end is not None and asked + (context.recipe.workload.prompt_tokens or 0) > end:
        yield (
            f"decode.max_new_tokens={asked}: there is room for {end:,} tokens, prompt and answer "
            "together, and answers end there"
        )


def _escapes(recipe: Recipe) -> Iterable[str]:
    """Note a backslash and a letter where a line break may be meant."""
    given = {
        "decode.stop": getattr(recipe.decode, "stop", ()),
        "task.prefix": [getattr(recipe.task, "prefix", None) or ""],
    }
    for name, texts in given.items():
        for text in texts:
            if found := re.search(r"\\[nrt]", text):
                yield (
                    f"{name} holds {found[0]}, a backslash and a letter. If a line break is meant: "
                    f"the shell makes it in $'{name}=…', YAML in \"…\""
                )


def _too_long(context: CheckContext) -> Iterable[Problem]:
    """Refuse a prompt that leaves no room for an answer."""
    recipe, shape = context.recipe, context.reshaped
    asked = recipe.workload.prompt_tokens
    end = limit(recipe, shape) if shape else None
    if shape and asked is not None and end is not None and asked >= end:
        whose = "the model" if end == shape.max_positions else "the cache"
        room = max(end - int(getattr(recipe.decode, "max_new_tokens", 0)), end // 2)
        yield Problem(
            message=f"workload.prompt_tokens={asked}: {whose} has room for {end:,} tokens, prompt "
            "and answer together",
            hint=f"workload.prompt_tokens={room}",
            code="prompt-too-long", where="workload",
        )  # fmt: skip


def _ruled_out(context: CheckContext) -> Iterable[Problem]:
    """Refuse any cache, or any attention, for a model whose code has no use for one.

    What else is wrong with such a choice does not matter, nor what would mend it.
    """
    choices, shape, traits = context.recipe.choices, context.shape, context.traits
    if shape is None:
        return
    if "model.own_cache" in traits and "cache.none" not in traits:
        yield OWN_CACHE.problem(
            "cache", f"cache={choices.get('cache')} does not work with {shape.model_type}"
        )
    if "model.attention_free" in traits and "attention.unchanged" not in traits:
        yield Problem(
            message=f"attention={choices.get('attention')} has nothing to compute: "
            f"{shape.model_type} has layers without attention only",
            hint="attention=native",
            code="attention-free", slot="attention",
        )  # fmt: skip


def _notes(hooks: Hooks, traits: Mapping[str, str]) -> Iterable[str]:
    for one in hooks.chosen:
        for trait, rule in getattr(one.plugin, "alarms", {}).items():
            if trait in traits:
                yield (
                    f"{one.slot}={one.choice} with {trait}, which {traits[trait]} provides: "
                    f"{rule.why}. Perhaps {rule.hint}. {rule.source} ({rule.seen})"
                )


def _is_known(trait: str, context: CheckContext) -> bool:
    """Tell whether a trait that is not there is missing, or only not read yet."""
    return context.shape is not None or not trait.startswith("model.")


def _refusal(slot: str, code: str, what: str, why: str | Rule) -> Problem:
    if isinstance(why, Rule):
        return why.problem(slot, what)
    return Problem(message=what, hint=why, code=code, slot=slot)


def _own(context: CheckContext) -> Iterable[Problem]:
    """Yield what no single plugin could know."""
    recipe, shape, target = context.recipe, context.shape, context.target
    if not isinstance(getattr(recipe.decode, "max_new_tokens", None), int):
        yield Problem(
            message=f"decode={recipe.choices.get('decode')} has no option max_new_tokens: int, "
            "which every decode plugin must have",
            hint="decode=generate, or add the option to the plugin",
            code="plugin-contract", slot="decode",
        )  # fmt: skip
    for name in ("batch", "prompt_tokens"):
        size = getattr(recipe.workload, name)
        if size is not None and size < 1:
            yield Problem(
                message=f"workload.{name}={size} must be 1 or more",
                hint=f"workload.{name}=1", code="value", where="workload",
            )  # fmt: skip
    yield from _too_long(context)
    if context.dtype == "bfloat16" and "target.bfloat16" not in target.traits:
        stored = ", in which the model is stored" if recipe.model.dtype.value == "auto" else ""
        yield Problem(
            message=f"{target.name} does not compute in bfloat16{stored}",
            hint="model.dtype=float16",
            code="dtype",
        )
    if recipe.model.trust_remote_code and not recipe.model.revision:
        yield Problem(
            message="model.trust_remote_code runs code that may change from day to day",
            hint="pin it: model.revision=COMMIT", code="remote-code",
        )  # fmt: skip
    if shape is not None and shape.remote_code and not recipe.model.trust_remote_code:
        yield Problem(
            message=f"transformers does not know '{shape.model_type}': the checkpoint brings code",
            hint="read that code, then model.trust_remote_code=true model.revision=COMMIT",
            code="remote-code",
        )  # fmt: skip
