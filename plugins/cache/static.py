"""cache=static: keys and values in tensors that are allocated once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine import hookimpl
from engine.contexts import CacheContext, CheckContext, EstimateContext, KeyValues, Receipt, Term
from engine.errors import Problem

if TYPE_CHECKING:
    from engine.session import Session

SMALLEST = 16


@dataclass
class Static:
    """Keep keys and values in tensors of fixed length: no growth, no surprise, compilable.

    `max_tokens` is that length, prompt and new tokens per sequence; None takes what the task asks
    for. It cannot grow afterwards, nor forget its last tokens.
    """

    max_tokens: int | None = None
    provides: ClassVar[tuple[str, ...]] = ("cache.static",)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse lengths that are none, or beyond the model's context."""
        limit = context.reshaped.max_positions if context.reshaped else None
        if context.shape is not None and "model.alibi" in context.shape.traits:
            # Its biases are as long as the tokens, the keys as long as the cache: an exception
            # from the middle of the model (transformers 5.23, seen 2026-11-22).
            yield Problem(
                slot="cache",
                code="cache-unsupported",
                message=f"cache=static does not run {context.shape.model_type}: transformers "
                "makes its ALiBi biases for the tokens there are, not for the cache's length",
                hint="cache=dynamic",
            )
        if self.max_tokens is None:
            return
        if self.max_tokens < SMALLEST:
            yield Problem(
                slot="cache",
                code="value",
                message=f"cache.max_tokens={self.max_tokens}: a prompt and an answer do not fit; "
                f"{SMALLEST} is the least",
                hint=f"cache.max_tokens={limit or 2048}",
            )
        elif limit and self.max_tokens > limit:
            yield Problem(
                slot="cache",
                code="context",
                message=f"cache.max_tokens={self.max_tokens} is more than the model's context of "
                f"{limit} tokens: nothing would ever fill it",
                hint=f"cache.max_tokens={limit}",
            )

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price keys and values of the full length, in the model's number format."""
        tokens = self.max_tokens or context.tokens
        kept = context.batch * context.shape.kv_values_kept(tokens)
        yield Term(name="KV cache", bytes=kept * context.value_bytes)

    @hookimpl
    def cache(self, context: CacheContext) -> KeyValues:
        """Give an empty cache, which allocates when the first keys come."""
        from transformers import StaticCache

        length = min(self.max_tokens or context.max_tokens, context.max_tokens)
        return KeyValues(cache=StaticCache(config=context.config, max_cache_len=length))

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Measure what the probe left in the cache."""
        from transformers import StaticCache

        cache = session.probe.cache
        layers = getattr(cache, "layers", [])
        tensors = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        held = int(cache.get_seq_length()) if cache is not None else 0
        length = max((tensor.shape[-2] for tensor in tensors), default=0)
        yield Receipt(
            slot="cache",
            claim="keys and values lie in tensors allocated once",
            evidence={
                "class": type(cache).__name__,
                "layers": len(layers),
                "bytes": size,
                "tokens allocated": length,
                "tokens held": held,
                "tokens sent": sum(session.probe.tokens),
            },
            ok=type(cache) is StaticCache and held == sum(session.probe.tokens) and length >= held,
        )
