"""Streaming text: never half a character, never half a stop string."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from engine.decoding.detokenize import Detokenizer, StopStrings
from tests.models import tiny_tokenizer

TOKENIZER = cast(PreTrainedTokenizerBase, tiny_tokenizer())


def _pieces(prompt: list[int], tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(TOKENIZER, prompt)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.finish()]


@given(st.text(max_size=30), st.text(max_size=30))
def test_pieces_join_to_the_text(prompt: str, text: str) -> None:
    before = TOKENIZER(prompt, add_special_tokens=False)["input_ids"]
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert "".join(_pieces(list(before), list(tokens))) == text.encode("utf-8").decode("utf-8")


def test_half_a_character_waits() -> None:
    tokens = list(TOKENIZER("€", add_special_tokens=False)["input_ids"])
    assert len(tokens) == 3
    assert _pieces([], tokens) == ["", "", "€", ""]
    assert "".join(_pieces([], tokens[:2])) == "\ufffd", "an end in the middle shows that it is one"


def test_special_tokens_are_not_text() -> None:
    assert TOKENIZER.eos_token_id is not None
    assert "".join(_pieces([], [int(TOKENIZER.eos_token_id)])) == ""


@pytest.mark.parametrize(
    ("pieces", "stops", "shown"),
    [
        (["ab", "cSTOPd"], ["STOP"], "abc"),
        (["abS", "TO", "Pd"], ["STOP"], "ab"),
        (["abST", "art"], ["STOP"], "abSTart"),
        (["one two"], ["two", "one"], ""),
        (["a\n", "\nb"], ["\n\n"], "a"),
        (["ST"], ["STOP"], "ST"),
        (["abc"], [], "abc"),
        (["aab"], ["ab"], "a"),
    ],
)
def test_text_is_cut_at_the_first_stop(pieces: list[str], stops: list[str], shown: str) -> None:
    cutter = StopStrings(stops)
    got = ""
    for piece in pieces:
        got += cutter.push(piece)
        if cutter.found:
            break
    else:
        got += cutter.finish()
    assert got == shown


@given(st.lists(st.text(alphabet="abST", max_size=4)), st.text(alphabet="abST", min_size=1))
def test_cutting_piecewise_is_cutting_at_once(pieces: list[str], stop: str) -> None:
    whole = "".join(pieces)
    cutter = StopStrings([stop])
    shown = "".join(cutter.push(piece) for piece in pieces if not cutter.found)
    shown += "" if cutter.found else cutter.finish()
    assert shown == whole.partition(stop)[0]
