"""When keys and values of earlier tokens may be used again, and how much of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.generate import capacity

if TYPE_CHECKING:
    from transformers import Cache

    from engine.contexts import KeyValues
    from engine.session import Session


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def tokens_held(cache: Cache) -> int:
    """Return the tokens that a cache has seen."""
    return int(cache.get_seq_length())


def cut(session: Session, cache: Cache, keep: int) -> bool:
    """Cut a cache back to its first `keep` tokens; False, and it is spoilt, where that fails."""
    held = tokens_held(cache)
    if keep == held:
        return True
    # Some layers of transformers say that they can be cut, and cannot: plugin and model know.
    traits = session.traits
    if "cache.croppable" not in traits or "model.uncroppable" in traits or not cache.is_croppable:
        return False
    try:
        cache.crop(keep - held)
    except RuntimeError:  # a sliding window that has already moved on
        return False
    return tokens_held(cache) == keep


def room_needed(session: Session, length: int) -> int:
    """Return the tokens that a cache must hold for a prompt of `length` and its answer."""
    needed = length + int(session.recipe.decode.max_new_tokens)
    limit = session.context_tokens
    return needed if limit is None else min(needed, limit)


def held_at_most(session: Session, values: KeyValues) -> int | None:
    """Return how many tokens a cache has room for; None where it grows or forgets."""
    return capacity(values.cache, session.shape.sliding_window)
