"""The reference: transformers alone, eager, float32, on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def greedy(folder: Path, ids: list[int], new: int, *, use_cache: bool = True) -> list[int]:
    """Return the new tokens behind `ids`."""
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    given = torch.tensor([ids])
    out = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=new,
        do_sample=False,
        use_cache=use_cache,
    )
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens
