"""cache=none: recompute every key and value for each token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from engine import hookimpl
from engine.contexts import CacheContext, KeyValues, Receipt

if TYPE_CHECKING:
    from engine.session import Session


@dataclass
class NoCache:
    """Keep no keys and values: no memory for them, and quadratic time. The reference for caches."""

    provides: ClassVar[tuple[str, ...]] = ("cache.none",)

    @hookimpl
    def cache(self, context: CacheContext) -> KeyValues:
        """Give none."""
        return KeyValues(cache=None)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Show that each pass of the probe sent all tokens again."""
        tokens = session.probe.tokens
        resent = all(later > earlier for earlier, later in pairwise(tokens))
        yield Receipt(
            slot="cache",
            claim="nothing is kept between tokens",
            evidence={
                "cache": type(session.probe.cache).__name__,
                "tokens per forward pass": ", ".join(map(str, tokens)),
            },
            ok=session.probe.cache is None and len(tokens) > 1 and resent,
        )
