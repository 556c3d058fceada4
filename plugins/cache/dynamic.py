"""cache=dynamic: keys and values that grow with the conversation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine import hookimpl
from engine.contexts import CacheContext, EstimateContext, KeyValues, Receipt, Term

if TYPE_CHECKING:
    from engine.session import Session


@dataclass
class Dynamic:
    """Keep keys and values in tensors that grow by each token; sliding layers keep their window."""

    provides: ClassVar[tuple[str, ...]] = ("cache.dynamic", "cache.croppable")

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price keys and values of all tokens, in the model's number format."""
        kept = context.batch * context.shape.kv_values_kept(context.tokens)
        yield Term(name="KV cache", bytes=kept * context.value_bytes)

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

        cache = session.probe.cache
        layers = getattr(cache, "layers", [])
        tensors = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        held = int(cache.get_seq_length()) if cache is not None else 0
        yield Receipt(
            slot="cache",
            claim="keys and values are kept, and grow with the tokens",
            evidence={
                "class": type(cache).__name__,
                "layers": len(layers),
                "bytes": size,
                "tokens held": held,
                "tokens sent": sum(session.probe.tokens),
            },
            ok=type(cache) is DynamicCache and size > 0 and held == sum(session.probe.tokens),
        )
