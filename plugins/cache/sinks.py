"""cache=sinks: keys and values of the first and the last tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine import hookimpl
from engine.caching.evicting import (
    EXCLUDES,
    MOST,
    SCATTERED,
    EvictingLayer,
    evicted_bytes,
    prove,
    refuse,
    watch,
)
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
class Sinks:
    """Forget all but the first `sinks` tokens and the last `window`: StreamingLLM.

    Models put what attention they have no use for on the first tokens; while these stay, endless
    text goes on where a window alone breaks down (Xiao et al. 2023, arXiv 2309.17453, section 3).
    The same as a mask that hides all others, prompts and turns of a chat included; in a padded
    batch the first real tokens of each row count. Keys stay rotated at the positions where they
    were written, and the model's context stays a limit; the paper counts positions anew within the
    cache.
    """

    sinks: int = 4
    window: int = 1024
    provides: ClassVar[tuple[str, ...]] = ("cache.evicting",)
    excludes: ClassVar[Mapping[str, str | Rule]] = EXCLUDES | SCATTERED

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse numbers that are none, and windows that the model's own are wider than."""
        yield from refuse(context, "sinks", self.window)
        if self.sinks < 1:
            yield Problem(
                slot="cache",
                code="value",
                message=f"cache.sinks={self.sinks}: without first tokens it is a plain window",
                hint="cache.sinks=4, or cache=sliding",
            )
        if self.sinks > MOST:
            yield Problem(
                slot="cache",
                code="value",
                message=f"cache.sinks={self.sinks} tokens are too many: the most is {MOST}",
                hint="cache=dynamic, which forgets nothing",
            )

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price sinks and window; between two steps it lacks the newest token."""
        layer = EvictingLayer(self.window, self.sinks)
        yield from growing(context, evicted_bytes(context, layer))

    @hookimpl
    def prepare(self, context: PrepareContext) -> PreTrainedModel:
        """Let long prompts see no more than single tokens would, and find the padding."""
        watch(context.model)
        return context.model

    @hookimpl
    def cache(self, context: CacheContext) -> KeyValues:
        """Give an empty cache."""
        made = cache_of(context.config, lambda: EvictingLayer(self.window, self.sinks))
        return KeyValues(cache=made)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Measure what the probe left, and what is left when the window overflows."""
        layer = EvictingLayer(self.window, self.sinks)
        yield prove(session, "only the first and the last tokens are kept", layer)
