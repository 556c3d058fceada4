"""cache=offloaded: keys and values in the computer's memory, fetched layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from engine import hookimpl
from engine.caching.layers import layers_kept
from engine.contexts import CacheContext, CheckContext, EstimateContext, KeyValues, Receipt, Term
from engine.errors import Problem
from engine.rules import Rule
from engine.shape import RECURRENT, WITHOUT_KEYS

if TYPE_CHECKING:
    from engine.session import Session


BUS = 20e9
"""Bytes per second between main memory and a GPU: four fifths of PCIe 4.0 with 16 lanes."""
BESIDE = Rule(
    code="offloaded-hybrid",
    why="these layers move their state together with their keys, and read it before they wait for "
    "what is fetched",
    hint="cache=dynamic",
    source="transformers, cache_utils: LinearAttentionAndFullAttentionLayer.prefetch, and "
    "Cache.update, which alone waits for the stream",
    seen="transformers 5.23.0, 2026-11-28",
)


@dataclass
class Offloaded:
    """Keep keys and values in the computer's memory, and only two layers' on the GPU.

    While one layer computes, a stream of its own fetches the next one's (transformers,
    DynamicCache(offloading=True)): the text may grow as long as main memory, and each step waits
    for the bus. Exact.
    """

    provides: ClassVar[tuple[str, ...]] = ("cache.dynamic", "cache.croppable", "cache.offloaded")
    needs: ClassVar[Mapping[str, str | Rule]] = {
        "target.cuda": Rule(
            code="offloaded-needs-cuda",
            why="its layers come and go by a stream of CUDA",
            hint="cache=dynamic, or target=a100-80gb (engine list target)",
            source="transformers, cache_utils.Cache.update, torch.cuda.default_stream",
            seen="transformers 5.23.0, 2026-11-22",
        )
    }

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse layers whose states would come over the bus as well, and models without keys."""
        kinds = set() if context.shape is None else set(context.shape.layer_types)
        if beside := sorted(kinds & RECURRENT - WITHOUT_KEYS):
            yield BESIDE.problem("cache", f"cache=offloaded does not work with {', '.join(beside)}")
        if "model.attention_free" in context.traits:
            yield Problem(
                slot="cache",
                code="does-nothing",
                message="cache=offloaded moves keys and values, and the model keeps none",
                hint="cache=dynamic",
            )

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price the two neighboring layers that are on the GPU together at most."""
        sizes = [
            values * tokens for _, values, tokens in layers_kept(context.shape, context.tokens)
        ]
        # After the last comes the first; layers without keys are passed over.
        sizes = [size for size in sizes if size]
        most = max((a + b for a, b in pairwise([*sizes, *sizes[:1]])), default=0)
        held = min(most, sum(sizes)) * context.batch * context.value_bytes
        # Each layer comes over the bus for each pass.
        bus = sum(sizes) * context.batch * context.value_bytes / BUS
        yield Term(name="KV cache, two layers of it", bytes=held, launches=2 * len(sizes))
        yield Term(name="the bus", seconds=bus)

    @hookimpl
    def cache(self, context: CacheContext) -> KeyValues:
        """Give an empty cache."""
        from transformers import DynamicCache

        return KeyValues(cache=DynamicCache(config=context.config, offloading=True))

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count the layers whose keys and values lie in main memory."""
        kept = session.probe.kept
        layers = getattr(session.probe.cache, "layers", [])
        keys = [layer.keys for layer in layers if getattr(layer, "keys", None) is not None]
        away = sum(each.device.type == "cpu" for each in keys)
        yield Receipt(
            slot="cache",
            claim="keys and values are kept in main memory, all but those about to be used",
            evidence={**kept, "layers with keys": len(keys), "of these in main memory": away},
            ok=getattr(session.probe.cache, "offloading", False)
            and session.device.type != "cpu"
            and kept["tokens seen"] == kept["tokens sent"]
            and away >= len(keys) - 1 > 0,
        )
