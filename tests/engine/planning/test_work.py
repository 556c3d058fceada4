"""What the terms of a pass say is moved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.contexts import Term
from engine.planning.planner import plan
from engine.recipe import compose
from tests.conftest import Build


def terms(name: str, *words: str, part: str = "token") -> list[Term]:
    """Return a pass's terms of a name, of the embedded model on a CPU."""
    found = plan(compose("base", ["model.path=recipes://embedded", "model.dtype=float32", *words]))
    return [term for term in getattr(found, part).terms if term.name == name]


@pytest.mark.parametrize("heads", ["mqa", "native"])
def test_plain_attention_reads_the_cache_and_copies_what_heads_share(heads: str) -> None:
    words = ("attention=eager", f"heads={heads}", "workload.prompt_tokens=200")
    (cache,) = (term for term in terms("KV cache", *words) if term.bytes)
    (scores,) = terms("scores of attention", *words)
    assert scores.moved > 2 * cache.bytes
    # The formula that takes a bias multiplies by shared keys as they are.
    (biased,) = terms("scores of attention", "position_encoding=alibi", *words[1:])
    assert cache.bytes < biased.moved < scores.moved
    # Positions that make the scores themselves get keys for every head.
    (made,) = terms(
        "scores of attention",
        "position_encoding=self-extend",
        "position_encoding.window=256",
        *words[1:],
    )
    assert biased.moved < made.moved < scores.moved


class Touched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of tensors of a size that operators read and write."""

    def __init__(self, numbers: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers, self.bytes = numbers, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            tensors = [each for each in (*args, result) if isinstance(each, torch.Tensor)]
            self.bytes += sum(each.nbytes for each in tensors if each.numel() == self.numbers)
        return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("position_encoding", ["native", "alibi"])
def test_plain_attention_touches_scores_as_often_as_is_priced(
    build: Build, dtype: str, position_encoding: str
) -> None:
    words = ("attention=eager", f"model.dtype={dtype}", f"position_encoding={position_encoding}")
    session = build(*words, "workload.prompt_tokens=37")
    shape = session.shape
    with torch.no_grad(), Touched(shape.heads * 37**2) as found:
        session.model(torch.arange(37)[None] + 3)
    terms = plan(session.recipe).prompt.terms
    moved = sum(term.moved for term in terms if term.name in ("scores of attention", "biases"))
    # Beside the scores it reads keys and values; the model's own code copies them for the heads
    # that share them.
    read, copied = shape.kv_heads, 2 * shape.heads if position_encoding == "native" else 0
    numbers = 2 * 37 * shape.layers * shape.head_dim * (read + copied)
    assert moved - numbers * session.model.dtype.itemsize == found.bytes


def test_terms_of_one_name_add_up_wherever_they_are() -> None:
    found = plan(compose("base", ["model.path=recipes://embedded"])).prompt
    more = [Term(name=name, bytes=10**10) for name in ("activations", "runtime reserve")]
    changed = replace(found, terms=(*found.terms, *more))
    assert sum(changed.bytes.values()) == changed.peak_bytes == found.peak_bytes + 2 * 10**10


def test_longer_prompts_move_more_between_the_products() -> None:
    short, long = (
        sum(
            term.moved
            for term in terms("activations", f"workload.prompt_tokens={tokens}", part="prompt")
        )
        for tokens in (100, 200)
    )
    assert long == 2 * short > 0


def test_8_bits_on_a_cpu_are_multiplied_as_float32() -> None:
    words = ("quantize=int8", "workload.prompt_tokens=200")
    (packed,) = (term for term in terms("packed weights", *words) if term.bytes)
    (space,) = terms("workspace of products", *words)
    assert space.moved == 8 * packed.bytes
    # The largest layer's weights, 192 x 512, in float32.
    assert space.bytes > 4 * 192 * 512
