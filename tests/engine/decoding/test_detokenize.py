"""Streaming text: never half a character."""

from __future__ import annotations

from typing import cast

from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from engine.decoding.detokenize import Detokenizer
from tests.engine.decoding.test_stop_strings import word_pieces
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


def test_the_spaces_that_a_tokenizer_puts_between_words_are_kept() -> None:
    tokenizer = word_pieces()
    tokens = list(tokenizer("stop here ! a stop here", add_special_tokens=False)["input_ids"])
    detokenizer = Detokenizer(tokenizer, [])
    found = "".join([*map(detokenizer.push, tokens), detokenizer.finish()])
    assert found == tokenizer.decode(tokens) == "stop here ! a stop here"
