"""When keys and values of earlier tokens may be used again, and how much of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
    # Some layers of transformers say that they can be cut, and cannot: the plugin knows.
    if "cache.croppable" not in session.traits or not cache.is_croppable:
        return False
    try:
        cache.crop(keep - held)
    except RuntimeError:  # a sliding window that has already moved on
        return False
    return tokens_held(cache) == keep


def frequencies(session: Session, tokens: int) -> int:
    """Tell rotary frequencies apart that change with the length of a text: equal, or not.

    Keys are rotated when they are written. Those of a shorter text do not fit a longer one whose
    frequencies are others (transformers' `dynamic_rope_update`).
    """
    text: Any = session.config.get_text_config()
    given = getattr(text, "rope_parameters", None) or {}
    sets: Iterable[Any] = (
        given.values() if any(isinstance(each, Mapping) for each in given.values()) else [given]
    )
    found = 0
    for each in sets:
        kind = str((each or {}).get("rope_type", ""))
        if kind not in ("dynamic", "longrope"):
            continue
        usual = each.get("original_max_position_embeddings") or text.max_position_embeddings
        if tokens > usual:
            found += tokens if kind == "dynamic" else 1
    return found


def room_needed(session: Session, length: int) -> int:
    """Return the tokens that a cache must hold for a prompt of `length` and its answer."""
    needed = length + int(session.recipe.decode.max_new_tokens)
    limit = session.context_tokens
    return needed if limit is None else min(needed, limit)


def held_at_most(session: Session, values: KeyValues) -> int | None:
    """Return how many tokens a cache has room for; None where it grows or forgets."""
    return capacity(values.cache, session.shape.sliding_window)
