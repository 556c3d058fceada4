"""attention=sinks: attend to the first few and the last tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine import hookimpl
from engine.attending import costs, windows
from engine.contexts import (
    Attention,
    AttentionContext,
    CheckContext,
    EstimateContext,
    Receipt,
    Term,
)
from engine.errors import Problem
from engine.rules import Rule

if TYPE_CHECKING:
    from engine.session import Session


@dataclass
class Sinks:
    """Attend to the first `sinks` tokens and the last `window`, the current one included.

    Xiao et al. 2023, arXiv 2309.17453, section 3.2 (StreamingLLM): softmax gives the first tokens
    the weight that it has no other use for, so hiding them ruins a model that was not trained with
    a window. Positions stay those of the text, not of what is seen as in the paper, so texts still
    end at the model's context. A model's own sliding window hides its sinks all the same.
    """

    sinks: int = 4
    window: int = 1020
    provides: ClassVar[tuple[str, ...]] = ("attention.window", "attention.bias")
    needs: ClassVar[Mapping[str, Rule]] = {"model.attention_interface": windows.INTERFACE}
    excludes: ClassVar[Mapping[str, Rule]] = {
        "cache.evicting": Rule(
            code="sinks-evicting-cache",
            why="a cache that forgets old tokens has forgotten the first ones too, or keeps them "
            "where a mask does not look for them",
            hint="cache=dynamic; or attention=sdpa, where the cache keeps sinks by itself",
            source="transformers, masking_utils: kv_offset is one number for all keys",
            seen="transformers 5.23.0, 2026-11-22",
        )
    }

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse no sinks, and a window that holds no token or hides none."""
        if self.sinks < 1:
            yield Problem(
                slot="attention",
                code="value",
                message=f"attention.sinks={self.sinks}: without sinks it is a plain window",
                hint="attention=window, or attention.sinks=4",
            )
        yield from windows.refuse(context, self.window, max(self.sinks, 1), "window")

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price a kernel under a mask of all queries and keys: what it hides is computed too."""
        yield from costs.fused(context)
        yield Term(name="mask", bytes=context.rows * context.met, during="pass", launches=10)

    @hookimpl
    def attention(self, context: AttentionContext) -> Attention:
        """Give a mask that hides the middle, and what computes attention under it."""
        windowed = windows.Windowed(context.config, self.window, self.sinks)
        return Attention(forward=windowed.forward, mask=windowed.mask)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count the calls that were masked, and the keys that the mask hides past the window."""
        yield windows.receipt(session)
