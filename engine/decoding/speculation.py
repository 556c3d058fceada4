"""Speculative decoding: guess some tokens, and let the model verify them all in one pass.

Leviathan et al. 2023, arXiv 2211.17192. Guesses are definite here, the likeliest token of a draft
model or a copy from the text. Then the paper's rejection sampling comes to this: pick each token
as if there were no guesses, and go on for as long as the guess was the same. So the tokens are
those of decoding one by one, sampled ones included, with the same draws in the same order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.caching.continuing import common
from engine.contexts import CheckContext, Generation, Receipt
from engine.decoding.loop import Tally, TokenDecoder, picker, rehearsal
from engine.errors import Problem, RuntimeFailure
from engine.rules import Rule

if TYPE_CHECKING:
    import torch
    from transformers import Cache

    from engine.session import Session
    from engine.shape import ModelShape

Drafter = Callable[["torch.Tensor", int], "torch.Tensor"]
"""Guesses what follows: (ids `[1, tokens]`, how many at most) → `[1, drafts]`."""

SEEN = "transformers 5.23.0, 2026-11-22"
STATIC = Rule(
    code="speculation-static-cache",
    why="rejected drafts must be cut off again, and a static cache cannot be cut",
    hint="cache=dynamic",
    source="huggingface/transformers#32946",
    seen=SEEN,
)
EVICTING = Rule(
    code="speculation-evicting-cache",
    why="verifying drafts evicts tokens that are needed again when the drafts are rejected",
    hint="cache=dynamic",
    source="cache_utils.py of transformers: only what was never dropped can be cropped",
    seen=SEEN,
)
RECURRENT = Rule(
    code="speculation-recurrent-model",
    why="rejected drafts stay in the state of its recurrent layers, which cannot be cut back",
    hint="decode=generate",
    source="vllm-project/vllm#43559; LinearAttentionCacheLayerMixin.is_croppable of transformers",
    seen=SEEN,
)
LONGROPE = Rule(
    code="speculation-longrope",
    why="its rotary angles change when the text grows beyond the original context, and rejected "
    "drafts would change them too early",
    hint="decode=generate",
    source="prepare_inputs_for_generation in modeling_phi3.py of transformers",
    seen=SEEN,
)
BY_PASS = Rule(
    code="speculation-by-pass",
    why="its 8-bit products spare the columns with an outlier in any token of a pass, so that "
    "drafts that go along change the tokens",
    hint="decode=generate, or quantize.bits=4",
    source="Dettmers et al. 2022, arXiv 2208.07339, section 3.2; int8_vectorwise_quant in "
    "bitsandbytes/backends/default/ops.py",
    seen="bitsandbytes 0.50.2, 2026-11-22",
)
EXCLUDES = {
    "cache.static": STATIC,
    "cache.evicting": EVICTING,
    "model.rope_varies": LONGROPE,
    "position.varies": LONGROPE,
    "weights.by_pass": BY_PASS,
}
UNCROPPABLE = frozenset({"linear_attention", "recurrent"})
"""Layer types with a state that cannot be cut back; convolutions record their past, and can."""


def refusals(context: CheckContext, num_draft_tokens: int) -> Iterator[Problem]:
    """Refuse numbers out of range, and what cannot forget rejected drafts."""
    if not 1 <= num_draft_tokens <= 64:
        yield Problem(
            slot="decode",
            code="value",
            message=f"decode.num_draft_tokens={num_draft_tokens} must be from 1 to 64",
            hint="decode.num_draft_tokens=4",
        )
    if context.shape is not None and not croppable(context.shape):
        choice = context.recipe.choices.get("decode")
        yield RECURRENT.problem(
            "decode", f"decode={choice} does not work with {context.shape.model_type}"
        )
    # Without a cache there is nothing to cut; what excludes itself by a rule is told by that rule.
    known = {"cache.croppable", "cache.none", "cache.static", "cache.evicting"}
    if not known & context.traits:
        yield Problem(
            slot="decode",
            code="trait-missing",
            message=f"decode={context.recipe.choices.get('decode')} cuts rejected drafts off the "
            f"cache, and cache={context.recipe.choices.get('cache')} does not say that it can be "
            "cut (cache.croppable)",
            hint="cache=dynamic",
        )


def croppable(shape: ModelShape) -> bool:
    """Tell whether all layers can forget their last tokens."""
    return not UNCROPPABLE.intersection(shape.layer_types)


@dataclass
class Proof:
    """What a short run has shown, made once for the receipts."""

    tokens: int
    passes: int
    tally: Tally
    held: int | None
    """Tokens in the cache afterwards; None without one."""
    sent: int
    """Tokens of prompt and answer, but for the last, which is sent to nobody."""
    equal: int
    """Tokens that decoding one by one gave as well, from the first on."""
    guessed: int
    """Drafts that were its own: where it had none, the proof has put some, the last one wrong."""


class SpeculativeDecoder(TokenDecoder):
    """Verify drafts row by row: rows of a batch take turns, each with a cache of its own."""

    num_draft_tokens: int
    proof: Proof | None = None

    def drafter(self) -> Drafter:
        """Return what guesses, for one row."""
        raise NotImplementedError

    def rows(self, generation: Generation, tally: Tally) -> Generator[list[int], None, None]:
        """Yield the tokens of each step, until all rows have ended."""
        tally.drafted = tally.accepted = 0
        padding = self.padding
        lines = [
            self.row(each, tally, self.drafter(), place)
            for place, each in enumerate(_split(generation))
        ]
        try:
            while True:
                said = [next(line, None) for line in lines]
                if all(token is None for token in said):
                    return
                yield [padding if token is None else token for token in said]
        finally:
            for line in lines:
                line.close()

    def row(
        self, generation: Generation, tally: Tally, draft: Drafter, place: int = 0
    ) -> Generator[int, None, None]:
        """Yield the tokens of one row, which is at `place` in its batch."""
        run = self.start(generation)
        sampler = self.options.sampler((self.context.seed + place) % 2**63, run.ids.device)
        pick = picker(run, sampler)
        finders = self.finders(generation)
        left = generation.max_new_tokens
        drafts, logits, recording = run.ids[:, :0], run.forward(), False
        try:
            while True:
                said = []
                for at in range(logits.shape[1]):
                    before = run.ids if not at else _joined(run.ids, drafts[:, :at])
                    said.append(int(pick(before, logits[:, at])))
                    ended = said[-1] in self.context.end_ids
                    ended = ended or any(find.stops_at(said[-1]) for find in finders)
                    ended = ended or len(said) == left
                    if ended or at == drafts.shape[1] or said[-1] != int(drafts[0, at]):
                        break
                _count(tally, said, drafts[0].tolist())
                told = 0
                try:
                    for token in said:
                        told += 1
                        yield token
                finally:  # a reader may leave in the middle: what it has not read was never said
                    if recording:
                        crop(run.cache, drafts.shape[1] + 1 - told)
                if ended:
                    return
                left -= len(said)
                run.append(run.ids.new_tensor([said]))
                drafts = draft(run.ids, min(self.num_draft_tokens, left - 1))
                if drafts.shape[1]:  # the prompt is through: recording it would keep all of it
                    recording = True
                    record(run.cache, True)
                logits = run.forward(drafts)
        finally:
            record(run.cache, False)

    def prove(self, session: Session) -> Proof:
        """Answer a short prompt, one by one and with drafts, right and wrong ones; only once."""
        if self.proof is None:
            self.proof = _proof(self, session)
        return self.proof

    def receipt(self, session: Session, claim: str, **more: str | int) -> Receipt:
        """Show a short run: what was guessed, what held, and what is left in the cache."""
        proof = self.prove(session)
        drafted, accepted = proof.tally.drafted or 0, proof.tally.accepted or 0
        # In fewer bits a pass over several tokens rounds otherwise than one by one.
        rounds = {"weights.packed", "cache.quantized"} & session.traits
        exact = session.model.dtype.itemsize >= 4 and not rounds
        return Receipt(
            slot="decode",
            claim=claim,
            evidence={
                "tokens of a short run": proof.tokens,
                "passes through the model": proof.passes,
                "drafted": drafted,
                "of these its own": proof.guessed,
                "accepted": accepted,
                "tokens left in the cache": "no cache" if proof.held is None else proof.held,
                "tokens sent and kept": proof.sent,
                "equal to one by one": proof.equal,
                **more,
            },
            ok=drafted > 0
            and proof.passes + accepted >= proof.tokens > 0
            and proof.held in (None, proof.sent)
            and (proof.equal == proof.tokens or not exact),
        )


def crop(cache: Cache | None, tokens: int) -> None:
    """Cut the last tokens off; with none to cut, windows still drop what they have recorded."""
    if cache is not None:
        cache.crop(-tokens)


def record(cache: Cache | None, past: bool) -> None:
    """Let windows and convolutions keep what they would drop, until the next crop; or no longer.

    Recording must end with the answer: afterwards a crop that needs more than is left would be
    wrong in silence, where without recording it raises.
    """
    for layer in [] if cache is None else cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = past


def _joined(ids: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat([ids, drafts], dim=-1)


def _count(tally: Tally, said: list[int], drafts: list[int]) -> None:
    same = sum(a == b for a, b in zip(said, drafts, strict=False))
    tally.drafted = (tally.drafted or 0) + len(drafts)
    tally.accepted = (tally.accepted or 0) + same
    tally.discarded += len(drafts) - same


def _split(generation: Generation) -> Iterator[Generation]:
    """Yield each row as a generation of its own, without padding."""
    rows, cache = len(generation.input_ids), generation.cache
    if rows == 1:
        yield generation
        return
    if cache is not None and int(cache.get_seq_length()):
        raise RuntimeFailure(
            "drafts are verified row by row, and a cache that holds a batch cannot be divided",
            hint="decode=generate",
        )
    for ids, mask in zip(generation.input_ids, generation.attention_mask, strict=True):
        alone = ids[mask.bool()][None]
        yield replace(
            generation,
            input_ids=alone,
            attention_mask=alone.new_ones(alone.shape),
            cache=copy.deepcopy(cache),
        )


def _proof(decoder: SpeculativeDecoder, session: Session) -> Proof:
    import torch

    passes: list[int] = []
    guessed: list[int] = []
    counter = session.model.register_forward_pre_hook(lambda *_: passes.append(1))
    alone, speculative = (rehearsal(session, new=8, repeats=3) for _ in range(2))
    tally, prompt = Tally(), speculative.input_ids.shape[1]
    try:
        with torch.no_grad():
            plain = [step[0] for step in TokenDecoder.rows(decoder, alone, Tally())]
            passes.clear()
            own = decoder.drafter()

            def draft(text: torch.Tensor, most: int) -> torch.Tensor:
                found = own(text, most)
                guessed.append(found.shape[1])
                told = text.shape[1] - prompt
                if found.shape[1] or most < 1:
                    return found
                right = plain[told : told + min(most, 2)]
                return text.new_tensor([[*right[:-1], (right[-1] + 1) % session.embedding_rows]])

            with closing(decoder.row(speculative, tally, draft)) as steps:
                found = list(steps)
    finally:
        counter.remove()
    same = common(found, plain)
    cache: Any = speculative.cache
    return Proof(
        tokens=len(found),
        passes=len(passes),
        tally=tally,
        held=None if cache is None else int(cache.get_seq_length()),
        sent=prompt + len(found) - 1,
        equal=same if len(found) == len(plain) else min(same, len(found) - 1),
        guessed=sum(guessed),
    )
