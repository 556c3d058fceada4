"""Stop strings: cut at the first, special tokens included; those that never come are told."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from engine.decoding.stop_strings import (
    StoppingText,
    StopStrings,
    never_produced,
    special_tokens,
)
from tests.models import tiny_tokenizer

BYTES = cast(PreTrainedTokenizerBase, tiny_tokenizer())
END = "<|im_end|>"
BYTES.add_special_tokens({"additional_special_tokens": [END]})
BYTES.add_tokens(["<tool>"])


def fast(backend: Tokenizer) -> PreTrainedTokenizerBase:
    make: Any = PreTrainedTokenizerFast
    return cast(
        PreTrainedTokenizerBase,
        make(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]"),
    )


def word_pieces() -> PreTrainedTokenizerBase:
    """Lower case only, words apart by spaces, as BERT's."""
    words = ["[UNK]", "stop", "here", "!", "st", "##op", *"abcdefghijklmnop", "##x"]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return fast(backend)


def pieces(byte_fallback: bool) -> PreTrainedTokenizerBase:
    """A few letters, and bytes for all others or not, as Llama 2's and T5's."""
    words = ["[UNK]", "\u2581", *"abcdest", "\u2581stop", "opp"]
    words += [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    backend = Tokenizer(
        models.Unigram([(word, -1.0) for word in words], unk_id=0, byte_fallback=byte_fallback)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return fast(backend)


def said(tokenizer: PreTrainedTokenizerBase, tokens: list[int], stops: list[str]) -> str:
    text = StoppingText(tokenizer, [], stops)
    shown = "".join(text.push(token) for token in tokens)
    assert text.stopped == bool(stops)
    return shown + text.finish()


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


@given(
    st.lists(st.tuples(st.text(alphabet="abST", max_size=4), st.booleans())),
    st.text(alphabet="abST", min_size=1),
)
def test_what_is_not_shown_is_matched_and_left_out(
    pieces: list[tuple[str, bool]], stop: str
) -> None:
    whole = "".join(piece for piece, _ in pieces)
    mask = [shown for piece, shown in pieces for _ in piece]
    cutter = StopStrings([stop])
    got = "".join(cutter.push(piece, shown=shown) for piece, shown in pieces if not cutter.found)
    got += "" if cutter.found else cutter.finish()
    cut = len(whole.partition(stop)[0])
    assert got == "".join(letter for letter, shown in zip(whole[:cut], mask, strict=False) if shown)
    assert cutter.found == (stop in whole)


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        (END, "abc"),
        (f"c{END}", "ab"),
        (f"{END}xy", "abc"),
        (f"bc{END}x", "a"),
        ("z</s>", "abcxy"),
        ("<tool>", "abcxyz"),
        ("z", "abcxy"),
    ],
)
def test_special_tokens_are_matched_and_never_shown(stop: str, shown: str) -> None:
    tokens = list(BYTES(f"abc{END}xyz</s><tool>", add_special_tokens=False)["input_ids"])
    assert said(BYTES, tokens, [stop]) == shown
    assert said(BYTES, tokens, []) == "abcxyz<tool>"


def test_special_tokens_have_names() -> None:
    names = special_tokens(BYTES)
    assert {"<pad>", "<s>", "</s>", END} == set(names.values())
    assert "<tool>" not in names.values(), "an added token that is text"


@pytest.mark.parametrize(
    ("tokenizer", "comes", "never"),
    [
        (BYTES, ["\u20ac", "\U0001f600", f"a{END}b", " ", "\n\n", "</s>", "e\u0301"], []),
        (word_pieces(), ["stop", "stop here", " stop", "[UNK]", "op", "stopx"], ["Stop", "stop!"]),
        (word_pieces(), ["re !", "!"], ["\u20ac", "\n", "stophere", "  "]),
        (pieces(byte_fallback=False), ["stop", "a stop", "topp"], ["\u20ac", "\n", "Stop", "zz"]),
        (pieces(byte_fallback=True), ["stop", "\u20ac", "\n", "Stop", "\U0001f600"], []),
    ],
)
def test_what_never_comes_is_found(
    tokenizer: PreTrainedTokenizerBase, comes: list[str], never: list[str]
) -> None:
    assert never_produced(tokenizer, [*comes, *never]) == never


def test_the_space_before_a_special_token_counts() -> None:
    tokenizer = word_pieces()
    assert tokenizer.decode([3, 0], skip_special_tokens=False) == "! [UNK]"
    assert never_produced(tokenizer, [" [", "! [UNK]"]) == []
    finder = StoppingText(tokenizer, [], ["! [UNK]"])
    assert [finder.stops_at(token) for token in (3, 0)] == [False, True]


@given(st.lists(st.integers(0, 22), min_size=1, max_size=6), st.data())
def test_whatever_tokens_make_is_not_said_to_never_come(
    ids: list[int], data: st.DataObject
) -> None:
    tokenizer = word_pieces()
    text = str(tokenizer.decode(ids, skip_special_tokens=False))
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : data.draw(st.integers(start + 1, len(text)))]
    assert never_produced(tokenizer, [stop]) == []
