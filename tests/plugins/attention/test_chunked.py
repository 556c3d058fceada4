"""attention=chunked is exact, and its memory grows with the length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import StaticCache

from engine.attending.scores import eager
from engine.plugins.attention.chunked import BlockAttention, Chunked
from tests.conftest import Build
from tests.plugins.helpers import hints, logits, plain, receipt, relative, verdict
from tests.test_equality import PROMPTS, greedy

BLOCKS = ("attention=chunked", "attention.query_block=5", "attention.key_block=7")
FAMILIES = (
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt_neox",
    "gpt_oss",
    "gpt2",
    "gpt_bigcode",
    "opt",
    "deepseek_v3",
)
IDS = (torch.arange(40)[None] * 7 + 3) % 300 + 3


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_plain_transformers_but_for_rounding(build: Build, family: str) -> None:
    session = build(*BLOCKS, "decode.max_new_tokens=12", family=family)
    folder = Path(session.recipe.model.path)
    reference = plain(folder)
    assert relative(logits(session.model, IDS), logits(reference, IDS)) < 1e-5
    expected = greedy(reference, folder, PROMPTS, new=12)
    assert [output.token_ids for output in session.generate(PROMPTS)] == expected


@pytest.mark.parametrize("cache", ["none", "static"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_it_is_so_with_every_cache(build: Build, family: str, cache: str) -> None:
    session = build(*BLOCKS, f"cache={cache}", "decode.max_new_tokens=12", family=family)
    folder = Path(session.recipe.model.path)
    expected = greedy(plain(folder), folder, PROMPTS, new=12)
    assert [output.token_ids for output in session.generate(PROMPTS)] == expected


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remember the largest tensor that an operator made."""

    numbers: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [each.numel() for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return made


@torch.no_grad()
def largest(model: Any, tokens: int, cache: bool) -> int:
    ids = torch.full((1, tokens), 5)
    kept = StaticCache(model.config, max_cache_len=tokens + 8) if cache else None
    # The decoder alone: logits are as many as the vocabulary is large.
    with Largest() as found:  # type: ignore[no-untyped-call]
        model.model(ids, attention_mask=torch.ones_like(ids), past_key_values=kept, use_cache=cache)
    return int(found.numbers)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("position", ["native", "alibi", "self-extend"])
def test_memory_grows_with_the_length(build: Build, position: str, cache: bool) -> None:
    """Twice the tokens are twice the largest tensor; with all scores in memory, four times."""
    words = [f"position_encoding={position}"]
    words += ["position_encoding.window=64"] * (position == "self-extend")
    small = ("attention=chunked", "attention.query_block=32", "attention.key_block=32")
    model = build(*small, *words, family="mistral").model
    assert largest(model, 1024, cache) <= 2.1 * largest(model, 512, cache)
    if position == "native":
        whole = build("attention=eager", family="mistral").model
        assert largest(whole, 1024, cache) > 3.9 * largest(whole, 512, cache)


def case(**given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a layer of 4 query and 2 key/value heads gives to its attention function."""
    made = torch.Generator().manual_seed(0)
    module, mask = torch.nn.Identity(), given.pop("mask", None)
    query = torch.randn(2, 4, 11, 8, generator=made)
    key, value = torch.randn(2, 2, 2, 17, 8, generator=made)
    return (module, query, key, value, mask), given


MASK = torch.ones(2, 1, 11, 17, dtype=torch.bool).tril(6)
ADDED = torch.randn(2, 4, 11, 17).masked_fill(~MASK, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"mask": MASK},
        {"mask": ADDED},
        {"mask": MASK, "scaling": 0.7, "softcap": 1.5},
        {"mask": MASK, "s_aux": torch.tensor([3.0, -1.0, 0.0, 9.0])},
        {"mask": ADDED, "s_aux": torch.tensor([3.0, -1.0, 0.0, 9.0]), "softcap": 2.0},
    ],
)
def test_the_running_softmax_is_the_softmax(given: dict[str, Any]) -> None:
    arguments, options = case(**given)
    found, _ = BlockAttention(3, 4)(*arguments, **options)
    expected, _ = eager()(*arguments, **options)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("attend", [eager(), BlockAttention(3, 4)])
@pytest.mark.parametrize("added", [False, True])
def test_rows_that_see_nothing_are_numbers(attend: Callable[..., Any], added: bool) -> None:
    mask = MASK.clone()
    mask[1, :, :5] = False
    if added:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    arguments, _ = case(mask=mask)
    found, _ = attend(*arguments)
    expected, _ = attend(*case(mask=MASK)[0])
    assert found.isfinite().all()
    assert found[0].equal(expected[0])
    torch.testing.assert_close(found[1, 5:], expected[1, 5:])


def test_heads_that_share_keys_do_not_copy_them() -> None:
    arguments, _ = case()
    module, query, key, value, _mask = arguments
    wide = (module, query[..., :1, :], *(each.repeat(1, 1, 100, 1) for each in (key, value)), None)
    with Largest() as found:  # type: ignore[no-untyped-call]
        BlockAttention(1, 2000)(*wide)
    assert found.numbers <= wide[2].numel()


def test_the_receipt_counts_blocks(build: Build) -> None:
    session = build(*BLOCKS)
    evidence = receipt(session, "attention").evidence
    # Two layers; 8 tokens are 2 x 2 blocks, of which one is all future; then 1 x 2 blocks.
    assert evidence["blocks computed"] == 2 * (3 + 2)
    assert evidence["blocks skipped, all hidden"] == 2
    assert evidence["largest block of scores"] == "5 queries x 7 keys"
    assert evidence["softmax operators"] == evidence["fused attention operators"] == 0
    assert verdict(Chunked(5, 7), session)
    assert not verdict(Chunked(4, 7), session)
    forward = BlockAttention(5, 7)
    assert not verdict(Chunked(5, 7), session, built={"attention": _Given(forward)})


class _Given:
    def __init__(self, forward: Any) -> None:
        self.forward = forward


def test_blocks_that_are_none_are_refused(model: Callable[[str], Path]) -> None:
    assert hints(Chunked(query_block=0, key_block=-1)) == [
        "attention.query_block=256",
        "attention.key_block=1024",
    ]
