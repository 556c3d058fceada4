"""Masks made by blocks are those that transformers makes whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from engine.attending.masks import block_of, by_blocks, with_bias

PATTERNS = {
    "causal": causal_mask_function,
    "window": sliding_window_causal_mask_function(5),
    "chunks": chunked_causal_mask_function(6, torch.zeros(2, dtype=torch.long)),
}
PADDED = torch.ones(2, 23, dtype=torch.bool)
PADDED[1, :4] = False


def asked(**changes: Any) -> dict[str, Any]:
    """Return what transformers asks a mask function: 20 new tokens behind 3 in the cache."""
    given = {
        "batch_size": 2,
        "q_length": 20,
        "kv_length": 23,
        "q_offset": 3,
        "kv_offset": 0,
        "mask_function": causal_mask_function,
        "attention_mask": PADDED,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    return given | changes


def whole_mask(**given: Any) -> torch.Tensor:
    """Return what transformers makes of it."""
    made = sdpa_mask(**given)
    assert made is not None
    return made


def bias(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return an uneven bias of two heads."""
    distance = (keys[None] - queries[:, None]).float()
    return torch.stack([distance, distance.square()])[None]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("offset", [0, 4])
def test_blocks_are_parts_of_the_whole(pattern: str, offset: int) -> None:
    """With `offset`, the cache has dropped its oldest keys."""
    given = asked(mask_function=PATTERNS[pattern], kv_offset=offset, kv_length=23 - offset)
    whole = whole_mask(**given)
    mask = by_blocks(8)(**given)
    assert mask.shape == whole.shape
    assert mask.dtype is torch.bool
    for rows in (slice(0, 8), slice(8, 20)):
        for columns in (slice(0, 5), slice(5, 23 - offset), slice(None)):
            assert block_of(mask, rows, columns).equal(whole[..., rows, columns])


def test_any_operator_makes_all_of_it() -> None:
    mask = by_blocks(8)(**asked())
    whole = whole_mask(**asked())
    assert type(mask) is not torch.Tensor
    assert type(~mask) is torch.Tensor
    assert (~mask).equal(~whole)
    assert mask[:, :, 2:5].equal(whole[:, :, 2:5])
    assert mask.contiguous() is mask  # as generate() does with masks for fixed caches


def test_few_queries_get_a_plain_mask() -> None:
    mask = by_blocks(20)(**asked())
    assert type(mask) is torch.Tensor
    assert mask.equal(whole_mask(**asked()))


def test_a_mask_is_never_left_out() -> None:
    assert sdpa_mask(**asked(attention_mask=None, q_length=23, q_offset=0)) is None
    mask = by_blocks(40)(**asked(attention_mask=None, q_length=23, q_offset=0))
    assert mask.equal(torch.ones(2, 1, 23, 23).tril().bool())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_bias_is_added_where_something_is_seen(dtype: torch.dtype) -> None:
    given = asked(dtype=dtype)
    found = with_bias(sdpa_mask, bias)(**given)
    seen = whole_mask(**given).expand(-1, 2, -1, -1)
    expected = bias(torch.arange(20) + 3, torch.arange(23)).to(dtype).expand(2, -1, -1, -1)
    assert found.dtype is dtype
    assert found[seen].equal(expected[seen])
    assert (found[~seen] == torch.finfo(dtype).min).all()
    blocks = with_bias(by_blocks(8), bias)(**given)
    assert (blocks.shape, blocks.dtype) == (found.shape, dtype)
    part = block_of(blocks, slice(4, 9), slice(3, 12))
    # In float32 whatever the model computes in.
    exact = with_bias(sdpa_mask, bias)(**asked())[..., 4:9, 3:12]
    assert part.equal(exact)
    assert (blocks + 0).equal(found)
