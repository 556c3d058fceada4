"""decode=beam: transformers' search, whose answers come whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.plugins.decode.beam import Beam
from tests.conftest import Build
from tests.plugins.helpers import priced, receipt, verdict


@pytest.mark.parametrize("cache", ["static", "none"])
def test_any_cache_gives_the_same_answers(build: Build, cache: str) -> None:
    prompts = ["def add", "x"]
    words = ("decode=beam", "decode.max_new_tokens=12")
    expected = [output.token_ids for output in build(*words).generate(prompts)]
    found = build(*words, f"cache={cache}").generate(prompts)
    assert [output.token_ids for output in found] == expected


def test_answers_come_whole_and_cost_all_beams(build: Build) -> None:
    session = build("decode=beam", "decode.num_beams=3", "decode.max_new_tokens=10")
    figures = session.generate("def add").figures
    assert figures.tokens_per_second is None
    assert figures.time_to_first_token == figures.seconds
    assert figures.forwarded_tokens == 3 * (figures.prompt_tokens + 9)


def test_each_turn_of_a_chat_is_computed_anew(build: Build) -> None:
    session = build("decode=beam", "decode.max_new_tokens=6")
    chat = session.chat()
    for message in ("hello", "and you?"):
        list(chat.send(message))
        assert chat.receipt is not None
        assert chat.receipt.ok
        assert chat.receipt.evidence["from_cache"] == 0


def test_the_receipt_counts_rows(build: Build) -> None:
    session = build("decode=beam", "decode.num_beams=3")
    assert receipt(session, "decode").evidence["rows in each pass"] == 3
    assert not verdict(Beam(num_beams=4), session)


def test_out_of_range_is_refused(model: Callable[[str], Path]) -> None:
    for option in ("num_beams=1", "num_beams=65", "length_penalty=11.0", "max_new_tokens=0"):
        words = [f"model.path={model('llama')}", "decode=beam", f"decode.{option}"]
        (problem,) = engine.check(engine.compose("base", words)).problems
        assert problem.code == "value"
        assert problem.hint.startswith(f"decode.{option.split('=')[0]}=")


def test_the_other_beams_are_priced(model: Callable[[str], Path]) -> None:
    words = [f"model.path={model('llama')}", "model.dtype=float32", "decode=beam"]
    found = priced(engine.check(engine.compose("base", words)))
    alone = priced(engine.check(engine.compose("base", [*words, "decode=generate"])))
    assert found["KV cache"] == 4 * alone["KV cache"]
    assert "KV cache" not in priced(engine.check(engine.compose("base", [*words, "cache=none"])))


def test_the_penalty_reaches_the_search(build: Build) -> None:
    session = build("decode=beam", "decode.num_beams=2", "decode.length_penalty=0.5")
    decoder: Any = session.built["decode"]
    assert decoder.more_settings()["length_penalty"] == 0.5
