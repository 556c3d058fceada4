"""What a model's code makes of a past that a cache gives back: measured, because codes differ.

Attention takes up keys of any number of tokens. A state is taken up by code of each family's own:
some ignore it when several tokens come at once (Mamba, Jamba, Zamba), some let padding into it
(RWKV, DeepSeek-V4), and some keep it in the model, where another conversation finds it (seen in
transformers 5.23.0).
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from engine.contexts import Generation
from engine.decoding.loop import Run, prepare

if TYPE_CHECKING:
    import torch
    from transformers import Cache

    from engine.session import Session

TOKENS = 12
"""Of the texts that are tried: more than the convolutions of any family reach back."""

LEAST = 0.06
"""Share of what the past does to the logits that may be lost. On tiny models of 28 families those
that lose any lost 0.09 and more (Jamba), and rounding took up to 0.042 (Zamba in bfloat16)."""

SAME = 1e-6
"""Share of the logits by which float32 rounds them: what is off by less is the same, also where
the past does nothing, as to convolutions that do not reach back so far."""

MOST = 0.25
"""The same where numbers are rounded, and more would be an error: no run stops on a wrong alarm."""

ROUNDING = 8
"""Steps of a number format by which logits of two passes may differ, then, for no other reason."""

PACKED = 0.1
"""The same where weights are packed, as a share of the logits."""

ONE_BY_ONE = "the model's code loses its state when several tokens come behind it at once"
"""Why what a cache holds is computed again."""


class Carrying:
    """Shares of what the past does to the logits that are lost on the way: 0 is exact, 1 is all.

    Each is measured when it is asked for first, on a short text. Models without states whose code
    transformers has are not tried: the tests of this engine have.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        known = "model.known" in session.shape.traits
        short = (session.context_tokens or TOKENS) < TOKENS
        self.tried = not short and ("model.recurrent" in session.shape.traits or not known)
        """Whether anything is measured."""

    @property
    def by_steps(self) -> bool:
        """Tell whether tokens one by one give what they give together."""
        return self.lost_by_steps < tolerated(self._session)

    @property
    def in_pieces(self) -> bool:
        """Tell whether a text in two pieces gives what it gives as one."""
        return self.lost_in_pieces < LEAST

    @property
    def padded(self) -> bool:
        """Tell whether a row with padding gives what it gives without."""
        return self.lost_by_padding < LEAST

    @cached_property
    def lost_by_steps(self) -> float:
        """Return what is lost when tokens come one by one, another conversation's in between."""
        if not self.tried or self._cache() is None:
            return 0.0
        text = self._text
        ours = self._run(text[:, :-2], self._cache())
        theirs = self._run(text.flip(-1), self._cache())
        for token in (text[:, -2:-1], text[:, -1:]):
            _pass(ours)
            _pass(theirs)
            ours.append(token)
            theirs.append(token)
        found, right, without = _pass(ours), self._logits(text), self._logits(text[:, -1:])
        return lost_for_sure(self._session, found, right, without)

    @cached_property
    def lost_in_pieces(self) -> float:
        """Return what is lost when several tokens come behind those that a cache holds."""
        cache = self._cache() if self.tried else None
        if cache is None:
            return 0.0
        text = self._text
        try:
            _pass(self._run(text[:, :-4], cache))
            found = _pass(self._run(text, cache))
        except (RuntimeError, ValueError):  # its code takes no more than one
            return 1.0
        return lost(found, self._logits(text), self._logits(text[:, -4:]))

    @cached_property
    def lost_by_padding(self) -> float:
        """Return what is lost when a row is padded on the left: all, if padding counts as text."""
        if not self.tried:
            return 0.0
        text, half = self._text, TOKENS // 2
        import torch

        mask = torch.ones_like(text).repeat(2, 1)
        mask[1, :half] = 0
        try:
            run = self._run(torch.cat([text.flip(-1), text])[:, :-1], self._cache(2), mask[:, :-1])
            _pass(run)
            run.append(torch.cat([text[:, :1], text[:, -1:]]))
            found = _pass(run)[1:]
        except (RuntimeError, ValueError):
            return 1.0
        return lost(found, self._logits(text[:, half:]), self._logits(text))

    @property
    def _text(self) -> torch.Tensor:
        import torch

        device, rows = self._session.device, self._session.embedding_rows
        return (7 * torch.arange(TOKENS, device=device) + 3)[None] % rows

    def _cache(self, batch: int = 1) -> Cache | None:
        """Return a fresh cache: the recipe's, or a plain one where that rounds or forgets."""
        session = self._session
        if {"cache.quantized", "cache.evicting"}.isdisjoint(session.traits):
            return session.new_cache(batch, 2 * TOKENS).cache
        from transformers import DynamicCache

        return DynamicCache(config=session.config)

    def _run(self, ids: torch.Tensor, cache: Cache | None, mask: torch.Tensor | None = None) -> Run:
        return run_of(self._session, ids, cache, mask)

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what follows a text that goes through the model as a whole."""
        return _pass(self._run(ids, None))


def run_of(
    session: Session, ids: torch.Tensor, cache: Cache | None, mask: torch.Tensor | None = None
) -> Run:
    """Return a run over ids `[batch, tokens]`, of which a cache may hold the first."""
    from transformers import GenerationConfig

    settings: Any = cast(Any, GenerationConfig)(
        max_new_tokens=TOKENS, do_sample=False, use_cache=cache is not None, pad_token_id=0
    )
    mask = ids.new_ones(ids.shape) if mask is None else mask
    generation = Generation(input_ids=ids, attention_mask=mask, cache=cache, max_new_tokens=1)
    return prepare(session.model, generation, settings)


def lost(found: torch.Tensor, right: torch.Tensor, without: torch.Tensor) -> float:
    """Return how far logits are from the right ones, as a share of what the past does to them.

    Args:
        without: the logits where the past is not there, or counts where it should not.
    """
    off = float((found - right).norm())
    if off <= SAME * float(right.norm()):
        return 0.0
    return off / max(float((without - right).norm()), off)


def lost_for_sure(
    session: Session, found: torch.Tensor, right: torch.Tensor, without: torch.Tensor
) -> float:
    """Return that, and 0 where rounding explains it."""
    import torch

    rounding = ROUNDING * torch.finfo(session.model.dtype).eps
    if "weights.packed" in session.traits:
        rounding = max(rounding, PACKED)
    if float((found - right).norm()) <= rounding * float(right.norm()):
        return 0.0
    return lost(found, right, without)


def tolerated(session: Session) -> float:
    """Return the share that may be lost for sure before it is an error."""
    exact = session.model.dtype.itemsize >= 4 and "weights.packed" not in session.traits
    return LEAST if exact else MOST


def _pass(run: Run) -> torch.Tensor:
    """Return the logits of what follows, `[batch, vocabulary]`."""
    import torch

    with torch.no_grad():
        return run.forward()[:, -1]
