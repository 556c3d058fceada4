"""Plugins that do nothing, or something else, and claim that they did what they should."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from engine import hookimpl
from engine.contexts import Attention, Heads, KeyValues, PositionEncoding, Quantization, Receipt


@dataclass
class Liar:
    """Gives a receipt that is no proof of anything."""

    slot: ClassVar[str] = "attention"

    @hookimpl
    def receipts(self, session):
        yield Receipt(slot=self.slot, claim="it took effect", evidence={"trust": "me"}, ok=True)


@dataclass
class ForwardNeverRuns(Liar):
    """A kernel that is put aside before the model runs."""

    @hookimpl
    def attention(self, context):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import sdpa_mask

        return Attention(forward=sdpa_attention_forward, mask=sdpa_mask)

    @hookimpl
    def prepare(self, context):
        context.model.set_attn_implementation("eager")
        return context.model


@dataclass
class OtherImplementation(Liar):
    """Names one implementation, and switches to another."""

    @hookimpl
    def attention(self, context):
        return Attention(implementation="sdpa")

    @hookimpl
    def prepare(self, context):
        context.model.set_attn_implementation("eager")


@dataclass
class NoReceipt:
    """Proves nothing."""

    @hookimpl
    def attention(self, context):
        return Attention(implementation="sdpa")


@dataclass
class ReceiptNotOk(NoReceipt):
    """Knows that it failed."""

    @hookimpl
    def receipts(self, session):
        yield Receipt(
            slot="attention", claim="the kernel ran", evidence={"kernel calls": 0}, ok=False
        )


@dataclass
class ReceiptForAnother(NoReceipt):
    """Proves what another plugin should prove."""

    @hookimpl
    def receipts(self, session):
        yield Receipt(slot="cache", claim="it took effect", evidence={}, ok=True)


@dataclass
class StoresNothing(Liar):
    """A cache that gives back what it gets."""

    slot = "cache"

    @hookimpl
    def cache(self, context):
        from transformers import Cache
        from transformers.cache_utils import DynamicLayer

        class Hollow(DynamicLayer):
            def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
                return key_states, value_states

        return KeyValues(cache=Cache(layer_class_to_replicate=Hollow))


@dataclass
class CountsButStoresNothing(Liar):
    """A cache that knows how many tokens it should have kept."""

    slot = "cache"

    @hookimpl
    def cache(self, context):
        from transformers import Cache
        from transformers.cache_utils import DynamicLayer

        class Hollow(DynamicLayer):
            seen = 0

            def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
                self.seen += key_states.shape[-2]
                return key_states, value_states

            def get_seq_length(self) -> int:
                return self.seen

            def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
                return query_length, self.seen

        return KeyValues(cache=Cache(layer_class_to_replicate=Hollow))


@dataclass
class GivesNoCache(Liar):
    """No cache at all."""

    slot = "cache"

    @hookimpl
    def cache(self, context):
        return KeyValues(cache=None)


@dataclass
class ClaimsFourBits(Liar):
    """Leaves the weights as they are."""

    slot = "quantize"

    @hookimpl
    def quantize(self, context):
        return Quantization()


@dataclass
class SkipsEveryLayer(Liar):
    """Quantizes all layers but those that there are."""

    slot = "quantize"

    @hookimpl
    def quantize(self, context):
        from transformers import BitsAndBytesConfig

        layers = ["_proj", "lm_head"]
        return Quantization(
            config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=layers)
        )


@dataclass
class FinishesNothing(Liar):
    """Has something to do once the model is loaded, and does not do it."""

    slot = "quantize"

    @hookimpl
    def quantize(self, context):
        return Quantization(finish=lambda model: None)


@dataclass
class ClaimsFewerHeads(Liar):
    """Leaves the heads as they are."""

    slot = "heads"

    @hookimpl
    def heads(self, context):
        return Heads(config=context.config)


@dataclass
class ClaimsLongerContext(Liar):
    """Leaves the positions as they are, in a copy."""

    slot = "position_encoding"

    @hookimpl
    def position_encoding(self, context):
        import copy

        return PositionEncoding(config=copy.deepcopy(context.config))


@dataclass
class ProbesNothing(Liar):
    """A task whose probe keeps away from the model."""

    slot = "task"

    @hookimpl
    def task(self, context):
        return self

    def probe(self) -> None:
        """Do nothing."""

    stream = batch = chat = probe
