"""attention=sinks keeps the first tokens of each sequence, padded or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.attending import windows
from engine.plugins.attention.sinks import Sinks
from tests.conftest import Build
from tests.plugins.attention.test_window import compare
from tests.plugins.helpers import hints, receipt, refusals, shape_of, verdict

WORDS = ("attention=sinks", "attention.sinks=2", "attention.window=5")


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen3", "gemma3", "gemma2", "gpt_oss", "opt", "gpt2"]
)
def test_tokens_equal_those_under_a_mask_by_hand(build: Build, family: str) -> None:
    compare(build, family, 5, 2, *WORDS)


@pytest.mark.parametrize("cache", ["static", "none"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_cache_makes_no_difference(build: Build, family: str, cache: str) -> None:
    compare(build, family, 5, 2, *WORDS, f"cache={cache}")


def test_the_receipt_counts_what_is_hidden(build: Build) -> None:
    session = build(*WORDS)
    evidence = receipt(session, "attention").evidence
    assert evidence[f"keys hidden from token {7 + windows.BEYOND}"] == windows.BEYOND
    assert verdict(Sinks(2, 5), session)
    assert not verdict(Sinks(2, 5), build("attention=sdpa"))


def test_what_hides_nothing_is_refused(model: Callable[[str], Path]) -> None:
    llama = shape_of(model("llama"))
    assert hints(Sinks(4, 60), llama) == hints(Sinks(4, 60)) == []
    assert hints(Sinks(0, 60), llama) == ["attention=window, or attention.sinks=4"]
    assert hints(Sinks(4, 0), llama) == ["attention.window=60"]
    (told,) = refusals(Sinks(4, 124), llama)
    assert "hides nothing" in told.message
