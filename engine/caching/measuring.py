"""What lies in a cache, counted in its tensors, and what that proves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.caching.layers import Layer, TokenCount, rehearse
from engine.contexts import Receipt

if TYPE_CHECKING:
    from transformers import Cache

    from engine.session import Session


def measure(cache: Cache | None) -> dict[str, str | int]:
    """Return what a cache holds, as evidence: counted in its tensors."""
    layers = [one for one in getattr(cache, "layers", []) if not isinstance(one, TokenCount)]
    ours = [layer for layer in layers if isinstance(layer, Layer)]
    theirs = [
        tensor
        for layer in layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    ]
    size = sum(tensor.numel() * tensor.element_size() for tensor in theirs)
    states = sum(_state_bytes(layer) for layer in layers if not isinstance(layer, Layer))
    seen = int(cache.get_seq_length()) if cache is not None else 0
    lengths = [layer.held for layer in ours] or [min(seen, each.shape[-2]) for each in theirs[-2:]]
    return {
        "class": type(cache).__name__,
        "layers": len(layers),
        "kind of layer": ", ".join(sorted({type(layer).__name__ for layer in layers})),
        "bytes": size + sum(layer.nbytes for layer in ours),
        "bytes if unquantized": size + sum(layer.plain_bytes for layer in ours),
        **({"bytes of states": states} if states else {}),
        "tokens held": max(lengths, default=0),
        "tokens seen": seen,
    }


def _state_bytes(layer: Any) -> int:
    """Return the bytes that a layer of transformers keeps in dicts: its states, by their number."""
    from torch import Tensor

    held = [kept for kept in vars(layer).values() if isinstance(kept, dict)]
    return sum(
        state.numel() * state.element_size()
        for states in held
        for state in states.values()
        if isinstance(state, Tensor)
    )


def prove_states(session: Session, kind: type[Cache]) -> Receipt:
    """Show that states are kept where there are no keys, and that steps go on from them."""
    kept, passes = session.probe.kept, session.probe.tokens
    carrying = session.carrying
    return Receipt(
        slot="cache",
        claim="states are kept, of one size however long the text, and tokens go on from them",
        evidence={
            **kept,
            "tokens per forward pass": ", ".join(map(str, passes)),
            "lost of the past, token by token": round(carrying.lost_by_steps, 6),
        },
        ok=type(session.probe.cache) is kind
        and int(kept.get("bytes of states", 0)) > 0
        and passes[-1] == 1
        and kept["tokens seen"] == kept["tokens sent"]
        and carrying.by_steps,
    )


def prove_packed(
    session: Session, claim: str, kind: type[Layer], tokens: int = 0, **asked: int
) -> Receipt:
    """Measure the bytes of the probe's cache; where it is too short to pack, of a longer text.

    Args:
        kind: of layer, in place of those that keep every token.
        tokens: after which it must have packed some.
        asked: options of the layers.
    """
    kept = session.probe.kept
    layers = getattr(session.probe.cache, "layers", ())
    ours = [one for one in layers if isinstance(one, kind) and one.parts]
    size, plain, longer = kept["bytes"], kept["bytes if unquantized"], {}
    if tokens and ours:
        trial = rehearse(ours[0], tokens)
        size, plain = trial.nbytes, trial.plain_bytes
        longer = {
            f"bytes of {trial.seen} tokens in a layer": size,
            f"bytes of {trial.seen} tokens if unquantized": plain,
        }
    given = [vars(one).get(name) == value for one in ours for name, value in asked.items()]
    return Receipt(
        slot="cache",
        claim=claim,
        evidence={**kept, "packed layers": len(ours), **longer},
        ok=bool(ours)
        and all(given)
        and kept["tokens seen"] == kept["tokens sent"]
        and 0 < int(size) < int(plain),
    )
