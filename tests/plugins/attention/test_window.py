"""attention=window hides what is older than its size, in every family and cache alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers.masking_utils import causal_mask_function

from engine.attending import windows
from engine.contexts import AttentionContext
from engine.errors import RecipeError
from engine.plugins.attention.sinks import Sinks
from engine.plugins.attention.window import Window
from tests.conftest import Build
from tests.models import tiny_config
from tests.plugins.attention.windowed import greedy
from tests.plugins.helpers import hints, receipt, refusals, shape_of, verdict

FAMILIES = [
    "llama",
    "mistral",
    "qwen3",
    "gemma3",
    "gemma2",
    "gpt_oss",
    "opt",
    "gpt2",
    "deepseek_v3",
]
PROMPTS = ["def add(a, b): return a", "tone"]
NEW = 12


def compare(build: Build, family: str, window: int, sinks: int, *words: str) -> None:
    """Hold one prompt, and a batch padded on the left, against the reference."""
    session = build(*words, f"decode.max_new_tokens={NEW}", family=family)
    folder = Path(session.recipe.model.path)
    expected = []
    for prompt in PROMPTS:
        ids: Any = session.tokenizer(prompt)["input_ids"]
        expected.append(greedy(folder, ids, NEW, window, sinks))
    assert session.generate(PROMPTS[0]).token_ids == expected[0]
    assert [each.token_ids for each in session.generate(PROMPTS)] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_those_under_a_mask_by_hand(build: Build, family: str) -> None:
    compare(build, family, 5, 0, "attention=window", "attention.size=5")


@pytest.mark.parametrize("cache", ["static", "none"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2"])
def test_the_cache_makes_no_difference(build: Build, family: str, cache: str) -> None:
    compare(build, family, 5, 0, "attention=window", "attention.size=5", f"cache={cache}")


def test_the_window_matters(build: Build) -> None:
    texts = [
        build("attention=window", f"attention.size={size}").generate(PROMPTS[0]).token_ids
        for size in (3, 100)
    ]
    assert texts[0] != texts[1]


def test_the_receipt_counts_what_is_hidden(build: Build) -> None:
    session = build("attention=window", "attention.size=5")
    evidence = receipt(session, "attention").evidence
    assert evidence[f"keys hidden from token {5 + windows.BEYOND}"] == windows.BEYOND
    assert evidence["attention calls"] == evidence["of them masked"] == 4
    assert evidence["computed by"] == "SDPA"
    assert "plain torch" in str(
        receipt(
            build("attention=window", "attention.size=5", family="gemma2"), "attention"
        ).evidence
    )


def test_what_hides_nothing_or_is_not_used_is_no_proof(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = build("attention=window", "attention.size=5")
    assert verdict(Window(5), session)
    assert not verdict(Window(5), build("attention=sdpa"))
    windowed = session.built["attention"].forward.__self__
    windowed.masked -= 1  # as if a layer had been given no mask
    assert not verdict(Window(5), session)
    windowed.masked += 1
    monkeypatch.setattr(windows.Windowed, "_seen", lambda self, given: causal_mask_function)
    assert not verdict(Window(5), session)


def test_what_hides_nothing_is_refused(model: Callable[[str], Path], build: Build) -> None:
    llama = shape_of(model("llama"))  # a context of 128
    mistral = shape_of(model("mistral"))  # every layer sees 16 tokens
    gemma = shape_of(model("gemma3"))  # one of two layers does
    assert hints(Window(16), llama) == hints(Window(15), mistral) == hints(Window(16), gemma) == []
    assert hints(Window(0), llama) == ["attention.size=64"]
    (told,) = refusals(Window(128), llama)
    assert "hides nothing" in told.message
    assert "context of 128" in told.message
    (told,) = refusals(Window(16), mistral)
    assert "window of its own of 16" in told.message
    assert hints(Window(200), replace(llama, max_positions=None)) == hints(Window(200)) == []
    with pytest.raises(RecipeError, match="hides nothing"):
        build("attention=window", "attention.size=128")
    with pytest.raises(RecipeError, match="AttentionInterface"):
        build("attention=window", "attention.size=8", family="bloom")


def test_two_sessions_count_for_themselves() -> None:
    context = AttentionContext(config=tiny_config("llama"))
    plugin = Window(4)
    first, second = plugin.attention(context), plugin.attention(context)
    assert first.forward is not None
    assert second.forward is not None
    assert first.forward.__self__ is not second.forward.__self__
    assert vars(plugin) == {"size": 4}
    assert Sinks().window + Sinks().sinks == Window().size
