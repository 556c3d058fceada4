"""The reference for windows: plain transformers, eager, float32, with a mask made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.plugins.helpers import plain

HIDDEN = torch.finfo(torch.float32).min


def by_hand(tokens: int, window: int, sinks: int = 0, own: int | None = None) -> torch.Tensor:
    """Return an additive mask `[1, 1, tokens, tokens]`, one number after the other."""
    mask = torch.full((1, 1, tokens, tokens), HIDDEN)
    for query in range(tokens):
        for key in range(query + 1):
            near = query - key < window or key < sinks
            if near and (own is None or query - key < own):
                mask[0, 0, query, key] = 0
    return mask


@torch.no_grad()
def greedy(folder: Path, ids: list[int], new: int, window: int, sinks: int = 0) -> list[int]:
    """Return the new tokens behind `ids`, everything computed again for each of them."""
    model = plain(folder)
    config: Any = model.config
    own = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [
        "sliding_attention" if own else "full_attention"
    ]
    tokens = list(ids)
    for _ in range(new):
        masks: Any = {
            kind: by_hand(len(tokens), window, sinks, own if kind == "sliding_attention" else None)
            for kind in ("full_attention", "sliding_attention")
        }
        if len(set(kinds)) == 1:
            masks = masks[kinds[0]]
        given = torch.tensor([tokens])
        places = torch.arange(len(tokens))[None]
        logits = model(
            input_ids=given, attention_mask=masks, position_ids=places, use_cache=False
        ).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(ids) :]
