"""decode=assisted: a small model guesses, the model verifies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from engine import hookimpl
from engine.caching.continuing import common
from engine.contexts import CheckContext, DecodeContext, Decoder, EstimateContext, Receipt, Term
from engine.decoding.draft import load_draft, read_draft, refuse_draft
from engine.decoding.sampling import Sampling
from engine.decoding.speculation import (
    EXCLUDES,
    Drafter,
    SpeculativeDecoder,
    crop,
    record,
    refusals,
)
from engine.errors import CheckpointError, Problem
from engine.positions.rotary import context_of
from engine.rules import Rule

if TYPE_CHECKING:
    import torch

    from engine.session import Session


@dataclass
class Assisted(Sampling):
    """Let a smaller model with the same vocabulary guess, and verify its guesses in one pass.

    Leviathan et al. 2023, arXiv 2211.17192, section 2: the tokens are those of the model alone,
    greedy or sampled, in fewer passes. `draft` is a model as `model.path` names one: a folder, a
    hub id, `recipes://NAME`; it runs in the same number format, and has a cache of its own. It
    guesses `num_draft_tokens` tokens at a time. Whether that is faster depends on how much smaller
    the draft is, and how often it is right: the figures tell.
    """

    draft: str = ""
    draft_revision: str | None = None
    num_draft_tokens: int = 4
    excludes: ClassVar[Mapping[str, Rule]] = EXCLUDES

    @property
    def provides(self) -> tuple[str, ...]:
        """Say that more than one token goes through the model at a time."""
        return (*super().provides, "decode.assisted")

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse numbers out of range, drafts of another vocabulary, and what cannot forget."""
        yield from super().check(context)
        yield from refusals(context, self.num_draft_tokens)
        yield from refuse_draft(self.draft, self.draft_revision, context)

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price the draft's weights and its cache, in the model's number format."""
        try:
            shape = read_draft(self.draft, self.draft_revision)
        except CheckpointError:
            return
        if shape is not None:
            kept = context.batch * shape.kv_values_kept(context.tokens)
            numbers = shape.parameters or 0
            yield Term(name="draft weights", bytes=numbers * context.value_bytes)
            yield Term(name="draft KV cache", bytes=kept * context.value_bytes)

    @hookimpl
    def decode(self, context: DecodeContext) -> Decoder:
        """Load and verify the draft, and give a decoder."""
        return AssistedDecoder(self, context)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Show a short run, and the draft that guessed in it."""
        decoder = session.built["decode"]
        draft = decoder.draft
        claim = "a draft's guesses are verified in fewer passes, and rejected ones cut off"
        yield decoder.receipt(
            session,
            claim,
            **{
                "draft": type(draft).__name__,
                "parameters of the draft": draft.num_parameters(),
                "parameters of the model": session.model.num_parameters(),
            },
        )


class AssistedDecoder(SpeculativeDecoder):
    """Draft with a model of its own."""

    options: Assisted

    def __init__(self, options: Assisted, context: DecodeContext) -> None:
        super().__init__(options, context)
        self.num_draft_tokens = options.num_draft_tokens
        self.draft = load_draft(options.draft, options.draft_revision, context)

    def drafter(self) -> Drafter:
        """Return one that remembers its row."""
        rows: Any = self.context.model.get_input_embeddings()
        return ModelDrafter(self.draft, vocabulary=int(rows.weight.shape[0]))


class ModelDrafter:
    """Guess with a small model, whose cache follows the text."""

    def __init__(self, model: Any, vocabulary: int) -> None:
        """Start with an empty cache; guesses are below `vocabulary`, the model's own."""
        from transformers import DynamicCache

        self._model = model
        self._vocabulary = vocabulary
        self._embedded = int(self._model.get_input_embeddings().weight.shape[0])
        self._limit = context_of(model.config) or None
        self._cache = DynamicCache(config=model.config)
        self._held: list[int] = []
        """The ids in the cache: text, then guesses."""

    def __call__(self, ids: torch.Tensor, most: int) -> torch.Tensor:
        """Return at most `most` guesses of what follows `ids`, `[1, tokens]`: `[1, drafts]`."""
        import torch

        text = ids[0].tolist()
        if self._limit is not None:
            most = min(most, self._limit - len(text))
        same = common(self._held, text)
        new = text[same:]
        if most < 1 or max(new, default=0) >= self._embedded:
            return ids[:, :0]
        if self._held:
            crop(self._cache, len(self._held) - same)
        feed, drafts = ids[:, same:], ids[:, :0]
        for _ in range(most):
            logits = self._model(
                input_ids=feed,
                attention_mask=torch.ones_like(torch.cat([ids, drafts], dim=-1)),
                past_key_values=self._cache,
                use_cache=True,
            ).logits
            feed = logits[:, -1:, : self._vocabulary].argmax(-1)
            drafts = torch.cat([drafts, feed], dim=-1)
            record(self._cache, True)
        self._held = text + drafts[0, :-1].tolist()
        return drafts
