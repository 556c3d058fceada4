"""Plugins whose hooks work, and return what does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine import hookimpl
from engine.contexts import Attention, KeyValues, Receipt


def fail(*args: Any, **kwargs: Any) -> Any:
    """Fail far from the hook that returned this."""
    raise LookupError("no kernel for this head size")


@dataclass
class Proven:
    """Claims that all is well."""

    @hookimpl
    def receipts(self, session):
        slot = next(one.slot for one in session.hooks.chosen if one.plugin is self)
        yield Receipt(slot=slot, claim="it works", evidence={"said": "so"}, ok=True)


@dataclass
class FailingForward(Proven):
    """A forward that raises."""

    @hookimpl
    def attention(self, context):
        from transformers.masking_utils import sdpa_mask

        return Attention(forward=fail, mask=sdpa_mask)


@dataclass
class FailingMask(Proven):
    """A mask that raises."""

    @hookimpl
    def attention(self, context):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return Attention(forward=sdpa_attention_forward, mask=fail)


@dataclass
class FailingCache(Proven):
    """A cache that raises when it is used."""

    @hookimpl
    def cache(self, context):
        from transformers import DynamicCache

        cache = DynamicCache(config=context.config)
        cache.update = fail
        return KeyValues(cache=cache)


KEPT: list[Any] = []


@dataclass
class ReusedCache(Proven):
    """One cache for all conversations."""

    @hookimpl
    def cache(self, context):
        from transformers import DynamicCache

        KEPT.append(DynamicCache(config=context.config))
        return KeyValues(cache=KEPT[0])


@dataclass
class FailingDecoder(Proven):
    """A decoder that raises."""

    max_new_tokens: int = 5

    @hookimpl
    def decode(self, context):
        return fail


@dataclass
class RubbishDecoder(Proven):
    """A decoder that yields words."""

    max_new_tokens: int = 5

    @hookimpl
    def decode(self, context):
        return lambda generation: iter(["word"])


@dataclass
class Wrapper:
    """A wrapper that replaces what another plugin answers."""

    hook: str = "attention"

    @hookimpl(wrapper=True)
    def attention(self, context):
        answer = yield
        return "something else" if self.hook == "attention" else answer

    @hookimpl(wrapper=True)
    def heads(self, context):
        answer = yield
        if self.hook == "heads":
            raise LookupError("the wrapper failed")
        return answer

    @hookimpl(wrapper=True)
    def receipts(self, session):
        answer = yield
        return None if self.hook == "receipts" else answer
