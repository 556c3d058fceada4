"""Every error that the engine raises on purpose.

    EngineError
    ├── RecipeError      exit 2   the recipe or an override asks for what cannot be
    ├── CheckpointError  exit 3   the model's files are not what they should be
    ├── DoesNotFit       exit 4   the plan exceeds the target's memory
    ├── PluginError      exit 5   a plugin broke the contract, or its choice did not take effect
    └── RuntimeFailure   exit 6   the run itself failed: prompt too long, logits not finite, …

Each carries one or more problems, and a problem says what was asked, who refuses, why, and what to
type instead. Anything that is not an `EngineError` is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong, in words a user can act on."""

    message: str
    """What was asked, who refuses it and why."""
    hint: str = ""
    """What to type instead: an override, a command, or the list of what there is."""
    code: str = "error"
    """Stable name of this kind of problem, for machines."""
    slot: str = ""
    """The hook point it belongs to, or '' where it belongs to none."""
    where: str = ""
    """`file:line` in a recipe, or the override as typed, or the checkpoint's file."""
    source: str = ""
    """Who says so, and when that was seen to hold; '' where no source is needed."""

    def __str__(self) -> str:
        place = f" [{self.where}]" if self.where else ""
        hint = f"\n  {self.hint}" if self.hint else ""
        source = f"\n  source: {self.source}" if self.source else ""
        return f"{self.message}{place}{hint}{source}"

    def as_dict(self) -> dict[str, str]:
        """Return the fields that `--json` prints."""
        return asdict(self)


class EngineError(Exception):
    """Refuse, with everything that is wrong at once."""

    exit_code: ClassVar[int] = 1

    def __init__(self, problems: str | Problem | Iterable[Problem], *, hint: str = "") -> None:
        if isinstance(problems, str):
            problems = Problem(message=problems, hint=hint)
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(map(str, self.problems)))


class RecipeError(EngineError):
    """Refuse a recipe or an override."""

    exit_code = 2


class CheckpointError(EngineError):
    """Refuse a model's files."""

    exit_code = 3


class DoesNotFit(EngineError):
    """Refuse a plan that exceeds the target's memory."""

    exit_code = 4


class PluginError(EngineError):
    """Blame a plugin, by name, hook and distribution."""

    exit_code = 5


class RuntimeFailure(EngineError):
    """Stop a run that cannot go on."""

    exit_code = 6


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the known word most like `word`, or '' when none is close."""
    return next(iter(get_close_matches(word, list(known), n=1, cutoff=0.5)), "")


def choices_hint(word: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Phrase 'did you mean' and the list of what there is; `prefix` makes it a line to paste."""
    known = sorted(known)
    close = nearest(word, known)
    guess = f"did you mean {prefix}{close}? " if close else ""
    return f"{guess}there are: {', '.join(known)}" if known else "there are none"
