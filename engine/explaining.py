"""Explain a recipe: what each choice does, what it costs by the plan, where that is written.

Nothing loads, and torch is not imported: what is told comes from docstrings, options and the
hook `estimate`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from enum import Enum
from importlib import metadata
from typing import Any

from engine import recipe as recipes
from engine import registry
from engine.calls import Chosen
from engine.contexts import ReshapeContext, Term
from engine.errors import EngineError
from engine.hooks import Hooks
from engine.planning.passes import Pricer
from engine.recipe import Recipe
from engine.shape import ModelShape
from engine.verdict import Verdict, check, find_shape

GUIDE = "https://huggingface.co/docs/transformers/llm_tutorial_optimization"
"""'Optimizing LLMs for Speed and Memory'."""

_ARXIV = re.compile(r"arXiv[:\s]+(\d{4}\.\d{4,5})")
_GUIDE = re.compile(r"Optimizing LLMs for Speed and Memory|\bguide\b")
_SECTION = re.compile(r"\bsections?\s")
# A sentence ends at a full stop before a space, but for the usual abbreviations.
_END = re.compile(r"(?<!\bal\.)(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bcf\.)(?<=[.!?])\s+(?=[^a-z\s])")


@dataclass(frozen=True)
class Option:
    """An option of a choice, and whether the recipe changed it."""

    name: str
    value: str
    default: str
    """'' when it has none."""
    changed: bool


@dataclass(frozen=True)
class Part:
    """One choice of the recipe."""

    slot: str
    choice: str
    """The recipe's word for it: a plugin's name or a preset's."""
    plugin: str
    """The plugin's name."""
    origin: str
    """Distribution and version."""
    about: str
    """First sentence of the docstring."""
    options: tuple[Option, ...]
    is_default: bool
    """It is what `base` chooses, with the same options."""
    own: Mapping[str, int] | None
    """Bytes that the choice itself adds to the plan, by name; None where that is unknown."""
    against_base: Mapping[str, int] | None
    """Bytes more (or, below 0, less) than with what `base` chooses there, by name."""
    sources: tuple[str, ...]
    """Sentences of the documentation that name papers and sections."""
    links: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """A recipe, explained: its choices in the order of a run, and what `check` finds."""

    verdict: Verdict
    parts: tuple[Part, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        verdict = self.verdict
        return {
            "ok": verdict.ok,
            "recipe": verdict.recipe.name,
            "target": verdict.target.name,
            "shape_known": verdict.shape is not None,
            "choices": [dataclasses.asdict(part) for part in self.parts],
            "problems": [problem.as_dict() for problem in verdict.problems],
        }


def explain(recipe: Recipe) -> Explanation:
    """Explain each choice of a recipe, also of one that `check` refuses.

    Raises:
        PluginError: when a plugin breaks the hook contract.
    """
    verdict = check(recipe)
    shape, _, _ = find_shape(recipe, verdict.hooks)
    base = recipes.compose("base", ["model.path=none"])
    plan = _Plan(verdict, shape)
    parts = [_part(one, getattr(base, one.slot), plan) for one in verdict.hooks.chosen]
    return Explanation(verdict, tuple(parts))


class _Plan:
    """Price the recipe, and the recipe with one choice exchanged."""

    def __init__(self, verdict: Verdict, shape: ModelShape | None) -> None:
        self._verdict = verdict
        self._shape = shape
        self._whole = self.bytes(verdict.hooks.chosen)

    def bytes(
        self, chosen: tuple[Chosen, ...], asked: tuple[Chosen, ...] = ()
    ) -> dict[str, int] | None:
        """Return the bytes that `asked` (all of `chosen`, unless given) add, by name.

        What is held is that at the end of the answer, what passes that of the prompt.
        """
        if self._shape is None:
            return None
        recipe = dataclasses.replace(
            self._verdict.recipe, **{one.slot: one.plugin for one in chosen}
        )
        try:
            hooks = Hooks(chosen)
            shape = hooks.reshape(ReshapeContext(recipe=recipe, shape=self._shape))
            pricer = Pricer(recipe, hooks, shape, self._verdict.target, None)
            batch, found = recipe.workload.batch, Hooks(asked or chosen)
            last = found.estimate(pricer.token(batch, *pricer.lengths).context)
            first = found.estimate(pricer.prompt(batch, *pricer.lengths).context)
            held = [term for term in last if not term.during]
            return _summed([*held, *(term for term in first if term.during)])
        except (EngineError, AttributeError, TypeError):
            return None  # options that check refuses may have no price

    def own(self, one: Chosen) -> dict[str, int] | None:
        """Return what a choice itself adds."""
        return self.bytes(self._verdict.hooks.chosen, (one,))

    def against(self, one: Chosen, other: Any) -> dict[str, int] | None:
        """Return what a choice changes when `other`, of base, is what it is held against."""
        exchanged = tuple(
            dataclasses.replace(each, plugin=other) if each is one else each
            for each in self._verdict.hooks.chosen
            if each is not one or other is not None  # observe, which may be empty
        )
        before = self.bytes(exchanged)
        if before is None or self._whole is None:
            return None
        names = [*self._whole, *(name for name in before if name not in self._whole)]
        changes = {name: self._whole.get(name, 0) - before.get(name, 0) for name in names}
        return {name: change for name, change in changes.items() if change}


def _summed(terms: list[Term]) -> dict[str, int]:
    found: dict[str, int] = {}
    for term in terms:
        found[term.name] = found.get(term.name, 0) + term.bytes
    return {name: size for name, size in found.items() if size}


def _part(one: Chosen, default: Any, plan: _Plan) -> Part:
    kind = type(one.plugin)
    origin = registry.origin(one.slot, kind)
    sentences = [
        *_sentences(inspect.getdoc(kind) if kind.__doc__ else ""),
        *_sentences(getattr(sys.modules.get(kind.__module__), "__doc__", "")),
    ]
    named = (each.removeprefix("Source: ") for each in sentences if _names_a_source(each))
    sources = tuple(dict.fromkeys(named))
    return Part(
        slot=one.slot,
        choice=one.choice,
        plugin=registry.name_of(one.slot, kind, one.choice),
        origin=origin,
        about=sentences[0] if sentences else "",
        options=tuple(_options(one.plugin)),
        is_default=one.plugin == default,
        own=plan.own(one),
        against_base=plan.against(one, default),
        sources=sources,
        links=tuple(dict.fromkeys([*_links(sources), *_homes(origin)])),
    )


def _options(plugin: Any) -> Iterator[Option]:
    for field in dataclasses.fields(plugin):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(plugin, field.name)
        yield Option(
            name=field.name,
            value=_shown(value),
            default="" if default is MISSING else _shown(default),
            changed=default is MISSING or value != default,
        )


def _shown(value: Any) -> str:
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]  # as a recipe writes it
    return str(value)


def _sentences(text: str | None) -> list[str]:
    """Split documentation into sentences, each on one line; blank lines end one, too."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text or ""))
    return [
        sentence
        for paragraph in paragraphs
        for sentence in _END.split(" ".join(paragraph.split()))
        if sentence
    ]


def _names_a_source(sentence: str) -> bool:
    return bool(_ARXIV.search(sentence) or _SECTION.search(sentence) or "://" in sentence)


def _links(sources: tuple[str, ...]) -> Iterator[str]:
    for sentence in sources:
        yield from (f"https://arxiv.org/abs/{number}" for number in _ARXIV.findall(sentence))
        if _GUIDE.search(sentence):
            yield GUIDE
        yield from re.findall(r"https?://[^\s)>,;]*[^\s)>,;.]", sentence)


def _homes(origin: str) -> Iterator[str]:
    """Yield where a third party's distribution says that it lives."""
    name = origin.rpartition(" ")[0]
    if not name or name == "recipe-engine":
        return
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return
    stated = [*(about.get_all("Project-URL") or ()), *(about.get_all("Home-page") or ())]
    for line in stated:
        yield line.rpartition(",")[2].strip()
