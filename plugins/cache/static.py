"""cache=static: keys and values in tensors that are allocated once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine import hookimpl
from engine.caching.layers import kept_by_type, layers_kept, refuse_other_layers
from engine.caching.measuring import prove_states
from engine.contexts import CacheContext, CheckContext, EstimateContext, KeyValues, Receipt, Term
from engine.errors import Problem
from engine.rules import Rule
from engine.shape import USUAL

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
    excludes: ClassVar[Mapping[str, str | Rule]] = {
        "model.alibi_by_mask": Rule(
            code="static-alibi",
            why="the model makes its ALiBi biases for the tokens there are, not for the cache's "
            "length",
            hint="cache=dynamic",
            source="transformers, models/bloom/modeling_bloom.py, build_alibi_tensor",
            seen="transformers 5.23.0, 2026-11-22",
        ),
        "model.bias_by_mask": Rule(
            code="static-bias",
            why="the model makes its position biases for as many keys as its masks have, and a "
            "prompt gets less from a static cache",
            hint="cache=dynamic",
            source="transformers, models/inkling/modeling_inkling.py, InklingAttention.forward",
            seen="transformers 5.23.0, 2026-11-28",
        ),
    }

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse lengths that are none, or beyond the model's context, and unknown layers."""
        yield from refuse_other_layers(context, "static", USUAL)
        limit = context.reshaped.max_positions if context.reshaped else None
        if self.max_tokens is None:
            return
        if "model.attention_free" in context.traits:
            yield Problem(
                slot="cache",
                code="does-nothing",
                message=f"cache.max_tokens={self.max_tokens} is a length of keys and values, and "
                "the model keeps none: its states have one size, however long the text",
                hint="cache.max_tokens=null",
            )
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
        tokens = min(self.max_tokens or context.capacity, context.capacity)
        layers = layers_kept(context.shape, tokens, newest=True)
        kept = context.batch * sum(values * length for _, values, length in layers)
        written = context.rows * sum(context.shape.kv_values)
        yield from kept_by_type(context, kept * context.value_bytes, tokens, newest=True)
        yield Term(
            name="KV cache",
            launches=2 * context.shape.layers,
            moved=2 * written * context.value_bytes,
        )
        if context.new < context.tokens:
            yield Term(name="mask", bytes=context.rows * tokens, during="pass", launches=8)

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

        cache, kept = session.probe.cache, session.probe.kept
        keys = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", [])]
        length = max((each.shape[-2] for each in keys if each is not None), default=0)
        if "model.attention_free" in session.traits:
            yield prove_states(session, StaticCache)
            return
        yield Receipt(
            slot="cache",
            claim="keys and values lie in tensors allocated once",
            evidence={**kept, "tokens allocated": length},
            ok=type(cache) is StaticCache
            and kept["tokens seen"] == kept["tokens sent"]
            and length >= int(kept["tokens seen"]),
        )
