"""cache=dynamic: keys and values that grow with the conversation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine import hookimpl
from engine.caching.layers import growing, layers_kept
from engine.caching.measuring import prove_states
from engine.contexts import CacheContext, EstimateContext, KeyValues, Receipt, Term

if TYPE_CHECKING:
    from engine.session import Session


@dataclass
class Dynamic:
    """Keep keys and values in tensors that grow by each token; sliding layers keep their window.

    The key-value cache of the guide's section 3.2. Between two steps a window lacks its newest
    token, whose place the next one takes.
    """

    provides: ClassVar[tuple[str, ...]] = ("cache.dynamic", "cache.croppable")

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price keys and values of all tokens, in the model's number format."""
        layers = layers_kept(context.shape, context.tokens)
        kept = context.batch * sum(values * tokens for _, values, tokens in layers)
        yield from growing(context, kept * context.value_bytes)

    @hookimpl
    def cache(self, context: CacheContext) -> KeyValues:
        """Give an empty cache."""
        from transformers import DynamicCache

        # Without the config, layers with a sliding window would keep everything.
        return KeyValues(cache=DynamicCache(config=context.config))

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Measure what the probe left in the cache."""
        from transformers import DynamicCache

        kept = session.probe.kept
        if "model.attention_free" in session.traits:
            yield prove_states(session, DynamicCache)
            return
        yield Receipt(
            slot="cache",
            claim="keys and values are kept, and grow with the tokens",
            evidence=kept,
            ok=type(session.probe.cache) is DynamicCache
            and int(kept["bytes"]) > 0
            and kept["tokens seen"] == kept["tokens sent"],
        )
