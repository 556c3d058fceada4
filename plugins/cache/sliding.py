"""cache=sliding: keys and values of the last tokens only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine import hookimpl
from engine.caching.evicting import EXCLUDES, EvictingLayer, evicted_bytes, prove, refuse, watch
from engine.caching.layers import cache_of, growing
from engine.contexts import (
    CacheContext,
    CheckContext,
    EstimateContext,
    KeyValues,
    PrepareContext,
    Receipt,
    Term,
)
from engine.errors import Problem
from engine.rules import Rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engine.session import Session


@dataclass
class Sliding:
    """Forget all but the last `window` tokens: memory stops growing, and so does the past.

    Each token sees itself and the `window - 1` before it, in each layer that has no window of its
    own (Beltagy et al. 2020, arXiv 2004.05150, section 3.1; Jiang et al. 2023, arXiv 2310.06825,
    section 2). The same as a mask that hides all others, prompts and turns of a chat included.
    Keys stay rotated at the positions where they were written. Without the first tokens, models
    that were not trained with a window break down (cache=sinks keeps them).
    """

    window: int = 1024
    provides: ClassVar[tuple[str, ...]] = ("cache.evicting",)
    excludes: ClassVar[Mapping[str, str | Rule]] = EXCLUDES

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse windows that are none, or that the model's own are wider than."""
        yield from refuse(context, "sliding", self.window)

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price the window; between two steps it lacks the newest token."""
        yield from growing(context, evicted_bytes(context, EvictingLayer(self.window)))

    @hookimpl
    def prepare(self, context: PrepareContext) -> PreTrainedModel:
        """Let long prompts see no more than single tokens would."""
        watch(context.model)
        return context.model

    @hookimpl
    def cache(self, context: CacheContext) -> KeyValues:
        """Give an empty cache."""
        return KeyValues(cache=cache_of(context.config, lambda: EvictingLayer(self.window)))

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Measure what the probe left, and what is left when the window overflows."""
        yield prove(session, "only the last tokens are kept", EvictingLayer(self.window))
