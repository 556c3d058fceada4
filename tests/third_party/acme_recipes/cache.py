"""cache=half: keys and values in 16 bits, whatever the model computes in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from engine import hookimpl
from engine.contexts import CacheContext, CheckContext, EstimateContext, KeyValues, Receipt, Term
from engine.errors import Problem

if TYPE_CHECKING:
    from engine.session import Session


@dataclass
class Half:
    """Keep keys and values in bfloat16: half the memory of float32, three digits of precision."""

    provides: ClassVar[tuple[str, ...]] = ("cache.dynamic", "cache.croppable")
    engine_api: ClassVar[str] = ">=1,<2"

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse models that compute in 16 bits, for which this does nothing."""
        stored = context.shape.dtype if context.shape else None
        dtype = context.recipe.model.dtype.value
        dtype = stored if dtype == "auto" else dtype
        if dtype in ("bfloat16", "float16"):
            yield Problem(
                slot="cache",
                code="does-nothing",
                message=f"cache=half does nothing: the model computes in {dtype}",
                hint="cache=dynamic",
            )

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price keys and values of all tokens, at two bytes a number."""
        numbers = context.batch * context.tokens * sum(context.shape.kv_values)
        yield Term(name="KV cache", bytes=2 * numbers)

    @hookimpl
    def cache(self, context: CacheContext) -> KeyValues:
        """Give an empty cache."""
        from transformers import Cache

        from acme_recipes.half_layer import HalfLayer

        return KeyValues(cache=Cache(layer_class_to_replicate=HalfLayer))

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Measure what the probe left in the cache."""
        layers = session.probe.cache.layers
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        numbers = sum(tensor.numel() for tensor in tensors)
        size = sum(tensor.nbytes for tensor in tensors)
        yield Receipt(
            slot="cache",
            claim="keys and values are kept in 16 bits",
            evidence={"layers": len(layers), "numbers": numbers, "bytes": size},
            ok=numbers > 0 and size == 2 * numbers,
        )
