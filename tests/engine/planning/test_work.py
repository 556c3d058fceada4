"""What the terms of a pass say is moved."""

from __future__ import annotations

import pytest

from engine.contexts import Term
from engine.planning.planner import plan
from engine.recipe import compose


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
    (made,) = terms("scores of attention", "position_encoding=self-extend", *words[1:])
    assert biased.moved < made.moved < scores.moved


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
