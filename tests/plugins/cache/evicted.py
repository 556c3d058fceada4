"""The reference for caches that forget: plain transformers, eager, float32, and a mask by hand."""

from __future__ import annotations

from typing import Any

import torch

LEAST = torch.finfo(torch.float32).min


def batch(lengths: tuple[int, ...], total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask `[rows, total]`, the rows padded on the left."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 300, (len(lengths), total), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : total - length] = 0
    return ids * mask, mask


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Return positions as generate() counts them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _additive(seen: torch.Tensor) -> torch.Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, LEAST)[:, None]


@torch.no_grad()
def reference(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, window: int, sinks: int = 0
) -> torch.Tensor:
    """Return the logits of one pass in which each token sees first and last tokens only."""
    total = ids.shape[1]
    query, key = torch.arange(total)[:, None], torch.arange(total)[None]
    start = mask.argmax(-1)[:, None, None]
    real = (key <= query) & (key >= start)
    seen = real & ((key > query - window) | (key < start + sinks))
    made: Any = _additive(seen)
    kinds = set(getattr(model.config, "layer_types", None) or ())
    if kinds:
        own = getattr(model.config, "sliding_window", None) or total
        made = {
            "full_attention": made,
            "sliding_attention": _additive(real & (key > query - own)),
            "linear_attention": mask if not mask.all() else None,
            "conv": mask if not mask.all() else None,
        }
    found: torch.Tensor = model(
        input_ids=ids, attention_mask=made, position_ids=positions(mask), use_cache=False
    ).logits
    return found


@torch.no_grad()
def in_pieces(
    model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor, sizes: tuple[int, ...]
) -> torch.Tensor:
    """Return the logits of several passes with a cache."""
    found, done = [], 0
    for size in sizes:
        end = done + size
        found.append(
            model(
                input_ids=ids[:, done:end],
                attention_mask=mask[:, :end],
                position_ids=positions(mask)[:, done:end],
                past_key_values=cache,
                use_cache=True,
            ).logits
        )
        done = end
    return torch.cat(found, 1)
