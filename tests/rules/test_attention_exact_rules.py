"""What exact attention and the positions in it refuse still fails, or is still wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache

from engine.attending.scores import key_positions
from engine.plugins.attention.eager import FALCON
from engine.plugins.position_encoding.self_extend import SelfExtend
from tests.models import tiny_config
from tests.plugins.helpers import logits, plain, relative


def test_falcon_alibi_eager(model: Callable[[str], Path]) -> None:
    """When this fails, transformers was mended, and the refusal can name the versions."""
    assert FALCON.code == "falcon-alibi-eager"
    folder = model("falcon")
    fused = logits(plain(folder, attn_implementation="sdpa"))
    assert relative(logits(plain(folder)), fused) > 0.01


def test_self_extend_evicting_cache() -> None:
    """A cache tells the masks one offset, so positions behind a gap come out wrong."""
    assert SelfExtend.excludes["cache.evicting"].code == "self-extend-evicting-cache"
    cache = DynamicCache(config=tiny_config("llama"))
    keys = torch.zeros(1, 2, 9, 16)
    cache.update(keys, keys, 0)
    _length, offset = cache.get_mask_sizes(1, 0)
    assert isinstance(offset, int)
    # Of tokens 0 to 8, the first two and the last three were kept.
    true = torch.tensor([[0, 1, 6, 7, 8]])
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    told = key_positions(torch.tensor([8]), mask, queries=1, keys=5)
    assert told.tolist() == [[4, 5, 6, 7, 8]] != true.tolist()
