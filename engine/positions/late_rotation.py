"""Rotate queries and keys at each pass anew, by frequencies that follow the length of the text.

Keys are cached unrotated. Above the first layer, keys and values also depend on the frequencies of
the pass that computed them, and a cache keeps them: only a pass over all tokens computes them anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.contexts import Receipt
from engine.positions.late_rope import rotary_embedding, rotate, still_turning
from engine.positions.rotary import context_of

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from engine.contexts import Turn
    from engine.session import Session

Frequencies = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""Makes those of each text: (trained ones `[frequencies]`, tokens `[rows]`) → `[rows,
frequencies]`."""

PROOF_TOKENS = 8


class LateRotation:
    """Rotates each row of a batch by its own length, as `engine.contexts.Rotation`."""

    def __init__(
        self,
        config: PretrainedConfig,
        scaled: PretrainedConfig,
        frequencies: Frequencies,
        label: str = "",
    ) -> None:
        """Rotate as the model's own code does.

        Args:
            config: as the checkpoint has it.
            scaled: as transformers must have it to make the same frequencies.
            label: the type of layers to rotate; '' for all.
        """
        text: Any = config.get_text_config()
        self.label = label
        self.calls = 0
        """Passes, once for each kind of mask, outside of compiled code."""
        self.longest: Any = 0
        """Tokens of the longest text so far."""
        self.active = True
        self.proof: Proof | None = None
        """What `prove` found, once."""
        self._scaled, self._frequencies = scaled, frequencies
        self._rotary = rotary_embedding(config)
        self.trained: torch.Tensor = getattr(self._rotary, self.buffer)
        self._rotate = rotate(config, 2 * len(self.trained))
        self._types: list[str] = list(getattr(text, "layer_types", None) or ())

    def __call__(
        self, query: torch.Tensor, query_positions: torch.Tensor, key_positions: torch.Tensor
    ) -> Turn:
        """Return what rotates the queries and keys of each layer."""
        import torch

        tokens = query_positions[:, -1] + 1
        if not torch.compiler.is_compiling():
            self.calls += 1
            self.longest = torch.maximum(tokens.max(), torch.as_tensor(self.longest).to(tokens))
        # Angles are positions times frequencies: here, those of each row.
        setattr(self._rotary, self.buffer, self.frequencies(tokens)[:, None])
        at_queries, at_keys = (
            self._rotary(query, positions, *self._named)
            for positions in (query_positions, key_positions)
        )

        def turn(
            layer: int, query: torch.Tensor, key: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if not (self.active and self.rotates(layer)):
                return query, key
            return self._rotate(query, *at_queries), self._rotate(key, *at_keys)

        return turn

    def frequencies(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return those of texts of so many `tokens`, `[rows]` → `[rows, frequencies]`."""
        if self.trained.device != tokens.device:
            self.trained = self.trained.to(tokens.device)
        return self._frequencies(self.trained, tokens)

    def rotates(self, layer: int) -> bool:
        """Tell whether a layer's queries and keys are rotated here."""
        return not self.label or self._types[layer] == self.label

    def by_transformers(self, tokens: int) -> torch.Tensor:
        """Return the frequencies that transformers makes for a text of so many tokens."""
        import torch

        made = rotary_embedding(self._scaled)
        made(torch.zeros(1), torch.tensor([[tokens - 1]]), *self._named)
        found: torch.Tensor = getattr(made, self.buffer)
        return found

    @property
    def buffer(self) -> str:
        """Return the name of the frequencies in rotary embeddings."""
        return f"{self.label}_inv_freq" if self.label else "inv_freq"

    @property
    def _named(self) -> tuple[str, ...]:
        return (self.label,) if self.label else ()


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What a built model did with keys that are to be rotated late."""

    still: int
    """Frequencies by which its own code rotates them before they are cached."""
    moved: float
    """How far keys in a cache lie apart that were written at both ends of the context; relative."""
    changed: int
    """Frequencies at the end of the context that are not the trained ones."""
    away: float
    """How far logits at the end of the context are from those of the model's own code, rotating by
    the frequencies that transformers makes; relative."""

    @property
    def ok(self) -> bool:
        """Tell whether keys are cached unrotated, and rotated as they should be."""
        return self.still == 0 and self.moved < 0.05 and self.changed > 0 and self.away < 0.01


def receipt(session: Session, rotation: LateRotation, claim: str) -> Receipt:
    """Show that keys are cached unrotated, how they are rotated, and how far that reaches."""
    rotation.proof = proof = rotation.proof or prove(session, rotation)
    before, after = context_of(session.source_config), session.context_tokens or 0
    return Receipt(
        slot="position_encoding",
        claim=claim,
        evidence={
            "frequencies that rotate keys before they are cached": proof.still,
            "cached keys at the context's ends differ by": proof.moved,
            "inverse frequencies": len(rotation.trained),
            "of them changed at its end": proof.changed,
            "logits there differ from the model's own rotation by": proof.away,
            "passes rotated": rotation.calls,
            "longest text": int(rotation.longest),
            "context before": before,
            "context after": after,
        },
        ok=proof.ok and rotation.calls > 0 and after > before,
    )


def prove(session: Session, rotation: LateRotation) -> Proof:
    """Run a few tokens at both ends of the context, and there with the model's own code, too."""
    import torch

    counted = rotation.calls, rotation.longest
    end = int(session.context_tokens or 0)
    trained, last = (rotation.by_transformers(tokens) for tokens in (1, end))
    used = rotation.frequencies(torch.tensor([end], device=session.device))[0].cpu()
    near, _ = _run(session, rotation, 0)
    far, late = _run(session, rotation, end - PROOF_TOKENS)
    with _rotating_itself(session, rotation, last):
        _, own = _run(session, rotation, end - PROOF_TOKENS)
    rotation.calls, rotation.longest = counted
    return Proof(
        still=still_turning(session.model, rotation.label),
        moved=max(_apart(a, b) for a, b in zip(far, near, strict=True)),
        changed=int((~torch.isclose(used, trained, rtol=1e-5, atol=0)).sum()),
        away=_apart(late, own),
    )


def _run(
    session: Session, rotation: LateRotation, start: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return what the first layer that is rotated has cached of a few tokens, and their logits."""
    import torch
    from transformers import DynamicCache

    model: Any = session.model
    positions = torch.arange(PROOF_TOKENS, device=session.device)[None]
    cache: Any = DynamicCache(config=session.config)
    with torch.no_grad():
        logits = model(
            input_ids=positions % session.embedding_rows,
            attention_mask=torch.ones_like(positions),
            position_ids=positions + start,
            past_key_values=cache,
            use_cache=True,
        ).logits
    held = next(
        [layer.keys, layer.values]  # latent attention has its rotated part in place of the values
        for index, layer in enumerate(cache.layers)
        if getattr(layer, "keys", None) is not None and rotation.rotates(index)
    )
    return held, logits.float()


@contextmanager
def _rotating_itself(
    session: Session, rotation: LateRotation, frequencies: torch.Tensor
) -> Iterator[None]:
    """Let a model's own code rotate queries and keys, and not the engine."""
    named = session.model.named_buffers()
    buffers = [each for name, each in named if name.rpartition(".")[2] == rotation.buffer]
    before = [each.clone() for each in buffers]
    rotation.active = False
    try:
        for each in buffers:
            each.copy_(frequencies)
        yield
    finally:
        rotation.active = True
        for each, value in zip(buffers, before, strict=True):
            each.copy_(value)


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).float().norm() / other.float().norm())
