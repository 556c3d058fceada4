"""attention=window: attend to the last tokens only."""

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
class Window:
    """Attend to the last `size` tokens, the current one included, in every layer.

    Beltagy et al. 2020, arXiv 2004.05150, section 3.1 ("sliding window"). The cache keeps what it
    keeps: which of it counts is all that changes. A model that was not trained so answers worse
    once its first tokens are hidden; `attention=sinks` keeps them.
    """

    size: int = 1024
    provides: ClassVar[tuple[str, ...]] = (
        "attention.window",
        "attention.bias",
        "attention.rotation",
    )
    needs: ClassVar[Mapping[str, Rule]] = {"model.attention_interface": windows.INTERFACE}

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse a size that holds no token, or hides none."""
        return windows.refuse(context, self.size)

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price a kernel under a mask of all queries and keys: what it hides is computed too."""
        yield from costs.fused(context)
        yield Term(name="mask", bytes=context.rows * context.met, during="pass", launches=10)

    @hookimpl
    def attention(self, context: AttentionContext) -> Attention:
        """Give a mask that hides old tokens, and what computes attention under it."""
        windowed = windows.Windowed(context.config, self.size)
        return Attention(forward=windowed.forward, mask=windowed.mask)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count the calls that were masked, and the keys that the mask hides past the window."""
        yield windows.receipt(session)
