"""For each slot a plugin that works, until one of its hooks is told to misbehave."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from typing import Any, ClassVar

from engine import hookimpl
from engine.contexts import Receipt, Term


class How(Enum):
    """What a hook does instead of its work."""

    works = "works"
    raises = "raises"
    quits = "quits"
    number = "number"
    nothing = "nothing"
    another = "another"


@dataclass
class Puppet:
    """Does what the engine's own plugin for the slot does."""

    hook: str = ""
    how: How = How.works
    max_new_tokens: int = 5
    slot: ClassVar[str]
    works_as: ClassVar[str]

    def play(self, hook: str, work: Any) -> Any:
        """Do the work of a hook, or whatever was asked for instead."""
        if hook != self.hook or self.how is How.works:
            return work()
        if self.how is How.raises:
            raise ZeroDivisionError("the puppet's string is torn")
        if self.how is How.quits:
            raise SystemExit(0)
        if self.how is How.nothing:
            return None
        return 42 if self.how is How.number else [Term(name=hook, bytes="many")]

    def original(self) -> Any:
        """Make the plugin that does the work."""
        module, _, name = self.works_as.partition(":")
        return getattr(import_module(f"engine.plugins.{module}"), name)()

    def proof(self) -> list[Receipt]:
        """Claim that it works, which is true."""
        return [Receipt(slot=self.slot, claim="it works", evidence={"puppets": 1}, ok=True)]

    @hookimpl
    def check(self, context):
        return self.play("check", list)

    @hookimpl
    def estimate(self, context):
        return self.play("estimate", list)

    @hookimpl
    def prepare(self, context):
        return self.play("prepare", lambda: context.model)

    @hookimpl
    def receipts(self, session):
        return self.play("receipts", self.proof)

    @hookimpl
    def observe(self, event):
        return self.play("observe", lambda: None)


def provider(hook: str) -> Any:
    """Make the method for a hook that only one slot answers."""

    def method(self: Puppet, context: Any) -> Any:
        return self.play(hook, lambda: getattr(self.original(), hook)(context))

    return hookimpl(method)


@dataclass
class LoadPuppet(Puppet):
    """For the slot load."""

    slot = "load"
    works_as = "load.transformers:Transformers"
    load = provider("load")


@dataclass
class QuantizePuppet(Puppet):
    """For the slot quantize."""

    slot = "quantize"
    works_as = "quantize.none:Unquantized"
    provides: ClassVar[tuple[str, ...]] = ("quantize.unchanged",)
    quantize = provider("quantize")


@dataclass
class HeadsPuppet(Puppet):
    """For the slot heads."""

    slot = "heads"
    works_as = "heads.native:NativeHeads"
    heads = provider("heads")


@dataclass
class PositionPuppet(Puppet):
    """For the slot position_encoding."""

    slot = "position_encoding"
    works_as = "position_encoding.native:NativePositions"
    position_encoding = provider("position_encoding")


@dataclass
class AttentionPuppet(Puppet):
    """For the slot attention."""

    slot = "attention"
    works_as = "attention.eager:Eager"
    attention = provider("attention")


@dataclass
class CachePuppet(Puppet):
    """For the slot cache."""

    slot = "cache"
    works_as = "cache.dynamic:Dynamic"
    cache = provider("cache")


@dataclass
class DecodePuppet(Puppet):
    """For the slot decode."""

    slot = "decode"
    works_as = "decode.generate:Generate"
    decode = provider("decode")


@dataclass
class TaskPuppet(Puppet):
    """For the slot task."""

    slot = "task"
    works_as = "task.text_generation:TextGeneration"
    task = provider("task")


@dataclass
class ObservePuppet(Puppet):
    """For the slot observe."""

    slot = "observe"
    works_as = ""
