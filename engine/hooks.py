"""The hooks as typed methods: what goes in, what comes out, and whether that is what was due."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.calls import Calls
from engine.errors import Problem

if TYPE_CHECKING:
    from engine import contexts
    from engine.contexts import Receipt, Term
    from engine.session import Session
    from engine.shape import ModelShape


class Hooks(Calls):
    """Ask the chosen plugins."""

    def configure(self, context: contexts.ConfigureContext) -> contexts.ModelConfig | None:
        """Ask the plugin that loads what the model's config is; None where config.json says it."""
        from engine.contexts import ModelConfig

        found = self._each("configure", {"context": context}, only=self.slot("load"))
        for one, given in found:
            return self._checked(
                one, "configure", given, ModelConfig, {"config": Mapping, "notes": Sequence}
            )
        return None

    def reshape(self, context: contexts.ReshapeContext) -> ModelShape:
        """Have every choice change the model's shape, one after the other."""
        from engine.shape import ModelShape

        for one in self.chosen:
            for answerer, shape in self._each("reshape", {"context": context}, only=one):
                self._checked(answerer, "reshape", shape, ModelShape, {})
                context = replace(context, shape=shape)
        return context.shape

    def check(self, context: contexts.CheckContext) -> list[Problem]:
        """Collect what the plugins find wrong."""
        return self._collect("check", context, Problem, message=str, hint=str, code=str, slot=str)

    def estimate(self, context: contexts.EstimateContext) -> list[Term]:
        """Collect the terms of the plan."""
        from engine.contexts import Term

        number = int | float
        work = dict.fromkeys(("launches", "moved", "flops", "seconds"), number)
        types = {"name": str, "bytes": int, "during": str, "rate": str, **work}
        return self._collect("estimate", context, Term, **types)

    def position_encoding(self, context: contexts.PositionContext) -> contexts.PositionEncoding:
        """Ask how positions are encoded."""
        from transformers import PretrainedConfig

        from engine.contexts import PositionEncoding

        return self._provide(
            "position_encoding",
            context,
            PositionEncoding,
            config=PretrainedConfig,
            converters=Sequence,
            bias=Callable | None,
            scores=Callable | None,
            rotation=Callable | None,
        )

    def heads(self, context: contexts.HeadsContext) -> contexts.Heads:
        """Ask how many key/value heads there are."""
        from transformers import PretrainedConfig

        from engine.contexts import Heads

        return self._provide("heads", context, Heads, config=PretrainedConfig, converters=Sequence)

    def quantize(self, context: contexts.QuantizeContext) -> contexts.Quantization:
        """Ask in how many bits the weights are kept."""
        from transformers.utils.quantization_config import QuantizationConfigMixin

        from engine.contexts import Quantization

        return self._provide(
            "quantize",
            context,
            Quantization,
            config=QuantizationConfigMixin | None,
            finish=Callable | None,
        )

    def attention(self, context: contexts.AttentionContext) -> contexts.Attention:
        """Ask what computes attention."""
        from engine.contexts import Attention

        return self._provide(
            "attention",
            context,
            Attention,
            implementation=str | None,
            forward=Callable | None,
            mask=Callable | None,
        )

    def load(self, context: contexts.LoadContext) -> contexts.Loaded:
        """Have the model made."""
        from transformers import PreTrainedModel, PreTrainedTokenizerBase

        from engine.contexts import Loaded

        return self._provide(
            "load",
            context,
            Loaded,
            model=PreTrainedModel,
            tokenizer=PreTrainedTokenizerBase | None,
        )

    def prepare(self, context: contexts.PrepareContext) -> None:
        """Have every plugin make the model ready, in place."""
        for one, model in self._each("prepare", {"context": context}):
            if model is not context.model:
                self.blame(
                    one,
                    "prepare",
                    f"gave a {type(model).__name__} that is not the model it got; change that one "
                    "in place",
                )

    def cache(self, context: contexts.CacheContext) -> contexts.KeyValues:
        """Ask for the place of keys and values."""
        from transformers import Cache

        from engine.caching.counting import make_countable
        from engine.contexts import KeyValues

        values = self._provide("cache", context, KeyValues, cache=Cache | None)
        if values.cache is not None:
            make_countable(values.cache)
            one = self.slot("cache")
            with self.blaming(one, "cache"):
                held = int(values.cache.get_seq_length())
            if held:
                self.blame(
                    one, "cache", f"gave a cache that holds {held} tokens; each must be fresh"
                )
        return values

    def decode(self, context: contexts.DecodeContext) -> contexts.Decoder:
        """Ask for the decoding loop."""
        decoder = self._provide("decode", context, object)
        if not callable(decoder):
            self.blame(
                self.slot("decode"),
                "decode",
                f"returned a {type(decoder).__name__}, which cannot be called",
            )
        return decoder

    def task(self, context: contexts.TaskContext) -> contexts.Task:
        """Ask for what the recipe is for."""
        task: Any = self._provide("task", context, object)
        missing = [
            name
            for name in ("probe", "stream", "batch", "chat")
            if not callable(getattr(task, name, None))
        ]
        if missing:
            self.blame(
                self.slot("task"),
                "task",
                f"returned a {type(task).__name__} without {', '.join(missing)}",
            )
        return task  # type: ignore[no-any-return]

    def receipts(self, session: Session) -> list[Receipt]:
        """Collect the proofs, each marked with the plugin that gave it."""
        from engine.contexts import Receipt

        found: list[Receipt] = []
        types = {"claim": str, "evidence": Mapping, "ok": bool}
        for one, result in self._each("receipts", {"session": session}):
            for receipt in self._listed(one, "receipts", result, Receipt, **types):
                if receipt.slot != one.slot:
                    self.blame(one, "receipts", f"gave a receipt for the slot {receipt.slot!r}")
                found.append(replace(receipt, plugin=one.choice))
        return found

    def observe(self, event: contexts.Event) -> None:
        """Tell everyone who looks on."""
        for _ in self._each("observe", {"event": event}):
            pass
