"""Have Hydra work out which configs a recipe consists of, leaving out what it stops at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hydra._internal.defaults_list import create_defaults_list
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override

from engine.composing import overrides
from engine.composing.defaults import Entry
from engine.composing.library import Library, Repository, Shelf, config_name
from engine.composing.mistakes import CHOICES, Mistakes, first_line
from engine.errors import EngineError, RecipeError
from engine.hookspecs import SLOTS

MAX_ROUNDS = 10


@dataclass(frozen=True)
class Chosen:
    """What a recipe consists of."""

    configs: list[ResultDefault]
    """What is merged, in this order."""
    overrides: list[Override]
    """What is applied after that."""
    choices: dict[str, str]
    """Slot → the word that the recipe used for it."""
    shelf: Shelf
    repository: Repository


def choose(name: str, library: Library, given: list[Override], mistakes: Mistakes) -> Chosen:
    """Return what a recipe and its overrides consist of, noting what is wrong with the choices.

    Raises:
        RecipeError: when there is no going on.
    """
    return _Choosing(name, library, given, mistakes).run()


class _Choosing:
    def __init__(
        self, name: str, library: Library, given: list[Override], mistakes: Mistakes
    ) -> None:
        self._name = name
        self._library = library
        self._given = given
        self._mistakes = mistakes
        self._dropped: frozenset[tuple[str, int]] = frozenset()

    def run(self) -> Chosen:
        for _ in range(MAX_ROUNDS):
            shelf = Shelf(self._library, self._dropped)
            try:
                chosen = self._attempt(shelf, self._given)
            except EngineError as error:
                self._note_files(shelf)
                for problem in error.problems:
                    self._mistakes.take(RecipeError(replace(problem, where=self._mistakes.file)))
                break
            except Exception as error:  # whatever Hydra says: a line of the recipe is the reason
                self._leave_out(shelf, error)
            else:
                self._note_files(shelf)
                self._note_choices(chosen)
                return chosen
        raise self._mistakes.error()

    def _attempt(self, shelf: Shelf, given: list[Override]) -> Chosen:
        repository = Repository(shelf)
        found = create_defaults_list(
            repo=repository,
            config_name=self._name,
            overrides_list=given,
            prepend_hydra=False,
            skip_missing=False,
        )
        choices = {
            slot: str(choice)
            for slot, choice in found.overrides.known_choices.items()
            if slot in CHOICES and choice is not None
        }
        return Chosen(found.defaults, found.config_overrides, choices, shelf, repository)

    def _leave_out(self, shelf: Shelf, error: Exception) -> None:
        suspect = self._suspect(shelf, error)
        if suspect is None:
            self._note_files(shelf)
            self._mistakes.add(first_line(error), where=self._mistakes.file)
            raise self._mistakes.error() from error
        if isinstance(suspect, Override):
            self._given = [other for other in self._given if other is not suspect]
            group, where = suspect.key_or_group, overrides.place(suspect.input_line or "")
            hint = where.lstrip("+") if suspect.is_add() else f"engine list {group}"
        else:
            self._dropped |= {(suspect.config, suspect.index)}
            group, where, hint = suspect.group, suspect.where, _order(suspect)
            self._mistakes.whole = self._mistakes.whole and group != ""
        self._mistakes.lost.add(group)
        self._mistakes.add(
            f"defaults: {first_line(error)}",
            hint=hint,
            code="defaults",
            slot=group if group in SLOTS else "",
            where=where,
        )

    def _suspect(self, shelf: Shelf, error: Exception) -> Override | Entry | None:
        """Return the line without which Hydra gets further; the most particular one first."""
        left = [one for one in _entries(shelf) if (one.config, one.index) not in self._dropped]
        # The recipe's own lines before those of what it builds on, the last one first.
        left.sort(key=lambda one: (one.config != self._name, not one.override, -one.index))
        presets = [entry for entry in left if "/" in entry.config]
        chosen = [one for one in reversed(self._given) if one.key_or_group in CHOICES]
        suspects: list[Override | Entry] = [*presets, *chosen, *left]
        for suspect in suspects:
            if self._helps(suspect, error):
                return suspect
        return None

    def _helps(self, suspect: Override | Entry, error: Exception) -> bool:
        given, dropped = self._given, self._dropped
        if isinstance(suspect, Override):
            given = [other for other in given if other is not suspect]
        else:
            dropped |= {(suspect.config, suspect.index)}
        try:
            self._attempt(Shelf(self._library, dropped), given)
        except Exception as other:
            return (type(other), str(other)) != (type(error), str(error))
        return True

    def _note_files(self, shelf: Shelf) -> None:
        for config, part in shelf.parts.items():
            for problem in part.problems:
                self._mistakes.take(RecipeError(problem))
            if part.problems and not part.values:
                self._mistakes.lost.add(config.rpartition("/")[0])
            self._mistakes.whole = self._mistakes.whole and not part.problems

    def _note_choices(self, chosen: Chosen) -> None:
        """Note what is chosen but broken or not there; Hydra also looks at what it leaves out."""
        used = dict.fromkeys(config_name(each.config_path or "") for each in chosen.configs)
        for config in used:
            group, _, choice = config.rpartition("/")
            if config in chosen.shelf.errors:
                self._mistakes.take(chosen.shelf.errors[config])
                self._mistakes.lost.add(group)
            elif config in chosen.shelf.unknown:
                self._mistakes.unknown_choice(
                    group, choice, self._library.names(group), self._where(chosen, group, choice)
                )
                self._mistakes.whole = self._mistakes.whole and group != ""

    def _where(self, chosen: Chosen, group: str, choice: str) -> str:
        for override in reversed(self._given):
            given = override.value()
            if override.key_or_group == group and (given == choice or "${" in str(given)):
                return overrides.place(override.input_line or "")
        entries = [entry for entry in _entries(chosen.shelf) if entry.group == group]
        entries.sort(key=lambda entry: entry.choice != choice)
        return entries[0].where if entries else self._mistakes.file


def _entries(shelf: Shelf) -> Iterator[Entry]:
    for part in shelf.parts.values():
        yield from (entry for entry, _ in part.defaults if entry is not None)


def _order(entry: Entry) -> str:
    if "/" in entry.config:
        return f"a preset is for its own slot; in the recipe: - override {entry.group}: …"
    if entry.override:
        return "base comes first, and entries with override come last"
    if entry.group:
        return f"to choose for a slot that base fills: - override {entry.group}: {entry.choice}"
    return "name a recipe once, and none that builds on this one"
