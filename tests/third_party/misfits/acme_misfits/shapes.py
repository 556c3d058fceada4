"""Classes that are no plugins."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from engine import hookimpl
from engine.contexts import Attention


def not_a_class() -> None:
    """Be no class."""


class Plain:
    """Not a dataclass; also installed under the name of one of the engine's own plugins."""


@dataclass(frozen=True)
class Frozen:
    """Options that cannot be changed."""

    size: int = 1


@dataclass
class Untyped:
    """An option of a type that no recipe can hold."""

    mode: Literal["fast", "slow"] = "fast"


@dataclass
class Misspelled:
    """A hook that does not exist."""

    @hookimpl
    def atention(self, context):
        return Attention()


@dataclass
class Misnamed:
    """An argument that does not exist."""

    @hookimpl
    def attention(self, contxt):
        return Attention()


@dataclass
class AnswersElsewhere:
    """A hook that belongs to another slot."""

    @hookimpl
    def cache(self, context):
        return None


@dataclass
class Future:
    """Made for a contract that is not there yet."""

    engine_api: ClassVar[str] = ">=2"


@dataclass
class UnreadableVersion:
    """Made for a contract that cannot be told."""

    engine_api: ClassVar[str] = "the newest"


@dataclass
class WrongTraits:
    """A string where a tuple is due: each letter would be a trait."""

    provides: ClassVar[str] = "attention.window"
    extra: list[int] = field(default_factory=list)
