"""decode=generate: one token after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine import hookimpl
from engine.contexts import DecodeContext, Decoder, Generation, Receipt
from engine.decoding.loop import TokenDecoder
from engine.decoding.sampling import Sampling

if TYPE_CHECKING:
    from engine.session import Session


@dataclass
class Generate(Sampling):
    """Draw each token from what the model expects, or take the likeliest (`temperature=0`).

    These options are all there is: a checkpoint's own defaults (temperature, top_k, repetition
    penalty, suppressed tokens, …) do not leak in, only its end, padding and begin tokens count.
    `top_k` and `top_p` (Holtzman et al. 2019, arXiv 1904.09751) and `min_p` (Nguyen et al. 2024,
    arXiv 2407.01082) limit what is sampled from, `repetition_penalty` (Keskar et al. 2019,
    arXiv 1909.05858) discourages what was said, `stop` ends an answer at any of these strings.
    """

    @hookimpl
    def decode(self, context: DecodeContext) -> Decoder:
        """Give a decoder."""
        return TokenDecoder(self, context)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Show the settings that a generation will really get."""
        import torch

        decoder = session.built["decode"]
        ids = torch.zeros(1, 1, dtype=torch.long)
        nothing = Generation(input_ids=ids, attention_mask=ids, cache=None, max_new_tokens=1)
        settings = decoder.settings(nothing)
        sampler = decoder.sampler(session.device)
        own = session.model.generation_config.temperature
        unused = {} if own is None else {"checkpoint's temperature, unused": float(own)}
        yield Receipt(
            slot="decode",
            claim="sampling follows the recipe alone",
            evidence={
                "sampling": sampler is not None,
                "temperature": 0.0 if sampler is None else float(sampler.temperature),
                "ids of end tokens": str(settings.eos_token_id),
                **unused,
            },
            ok=(0.0 if sampler is None else sampler.temperature) == self.temperature
            and not settings.do_sample
            and set(settings.eos_token_id or ()) == session.end_ids,
        )
