"""The tokenizer of a GGUF file is the original's, and one beside it that is another is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaTokenizer

from engine.errors import CheckpointError
from engine.loading import gguf_header, gguf_tokenizer
from tests.gguf_files import TOKENS, tokenizer_keys, write_file
from tests.models import tiny_tokenizer

pytest.importorskip("gguf")

TEXTS = (
    "def add(a, b):\n\treturn a + 12345  # it's\r\n",
    "  two  spaces, and the end </s> of it <s>",
    "größer 漢字 🙂 <|im_start|> <|endoftext|>",
    "",
)
KEYS = tokenizer_keys(TOKENS)
HALF = {"x.weight": np.ones((2, 32), np.float32)}


def load(folder: Path, ends: tuple[int, ...] = (2,), **changes: Any) -> Any:
    """Write a file with other keys of the tokenizer (None takes one out), and load what it says."""
    keys = {**KEYS, **{f"tokenizer.{n.replace('__', '.')}": v for n, v in changes.items()}}
    keys = {name: value for name, value in keys.items() if value is not None}
    file = write_file(folder / "x.gguf", "llama", keys, HALF)
    return gguf_tokenizer.load(gguf_header.read(file), folder, False, ends)


@pytest.mark.parametrize("bos", [True, False])
def test_a_byte_level_tokenizer_is_the_original(tmp_path: Path, bos: bool) -> None:
    ours, original = load(tmp_path, ggml__add_bos_token=bos), tiny_tokenizer()
    assert len(ours) == TOKENS
    for text in TEXTS:
        ids = original(text).input_ids
        assert ours(text).input_ids == [1] * bos + ids
        assert ours.decode(ids) == original.decode(ids)
    assert ours.chat_template == original.chat_template
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<s>", "</s>", "<pad>")


@pytest.mark.parametrize("stated", [True, False, None])
def test_words_of_llama_3_are_tokens_whatever_the_merges(
    tmp_path: Path, stated: bool | None
) -> None:
    """And its texts begin with a token of their own, unless the header says otherwise."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    tokens = [*KEYS["tokenizer.ggml.tokens"], "Ġunreachable"]
    merges = [tuple(each.split(" ")) for each in KEYS["tokenizer.ggml.merges"]]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    original = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    split = Regex(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"])
    original.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    types = [*KEYS["tokenizer.ggml.token_type"], 1]
    ours = load(
        tmp_path,
        ggml__pre="llama-bpe",
        ggml__tokens=tokens,
        ggml__token_type=types,
        ggml__add_bos_token=stated,
    )
    for text in ("an unreachable word", "1234567 it's"):
        due = [1] * (stated is not False) + original.encode(text).ids
        assert ours(text).input_ids == due
    assert TOKENS in ours("an unreachable word").input_ids


PIECES = ["▁", *"abcdefghijklmnopqrstuvwxyz,.", "▁a", "ab", "▁ab", "cd", "▁abcd"]


def sentencepiece() -> tuple[Any, dict[str, Any]]:
    """Return a tokenizer of Llama 2's kind, and what the conversion writes of it."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    scores = [0.0] * 259 + [-float(place) for place in range(len(PIECES))]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "ab"), ("c", "d"), ("▁ab", "cd")]
    fast: Any = LlamaTokenizer
    vocabulary = {token: place for place, token in enumerate(tokens)}
    tokenizer = fast(vocab=vocabulary, merges=merges, add_bos_token=True, add_eos_token=False)
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": True,
    }
    return tokenizer, keys


@pytest.mark.parametrize("stated", [True, None], ids=["stated", "left out"])
def test_a_tokenizer_of_sentence_pieces_is_the_original(
    tmp_path: Path, stated: bool | None
) -> None:
    original, keys = sentencepiece()
    more = {} if stated is None else {"tokenizer.ggml.add_bos_token": stated}
    file = write_file(tmp_path / "x.gguf", "llama", {**keys, **more}, HALF)
    ours: Any = gguf_tokenizer.load(gguf_header.read(file), tmp_path, False, ())
    assert len(ours) == len(keys["tokenizer.ggml.tokens"])
    for text in ("abcd abcd", "  cab, ü", *TEXTS):
        assert ours(text).input_ids == original(text).input_ids, text
    keys["tokenizer.ggml.add_space_prefix"] = False
    file = write_file(tmp_path / "x.gguf", "llama", keys, HALF)
    with pytest.raises(CheckpointError, match="add_space_prefix is False in the file, and True of"):
        gguf_tokenizer.load(gguf_header.read(file), tmp_path, False, ())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"ggml__model": None}, "there is no tokenizer, neither in the file nor beside it"),
        ({"ggml__tokens": None}, "there is no tokenizer, neither in the file nor beside it"),
        ({"ggml__model": "rwkv"}, "transformers builds no 'rwkv' tokenizer"),
        ({"ggml__pre": None}, "the file does not say how text is split"),
        ({"ggml__pre": "falcon"}, "the file splits text as 'falcon', which transformers cannot"),
        ({"ggml__eos_token_id": 9999}, "transformers cannot build the tokenizer: IndexError"),
    ],
)
def test_what_cannot_be_built_is_named(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(CheckpointError, match=why) as refused:
        load(tmp_path, **changes)
    assert "put tokenizer.json and tokenizer_config.json" in str(refused.value)


def test_ways_to_split_text_are_those_that_transformers_has() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    assert gguf_tokenizer._splits() == set(GGUF_PRE_TOKENIZER_SPLITS)
    assert not gguf_tokenizer._AS_GPT2 & set(GGUF_PRE_TOKENIZER_SPLITS)


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """Return a folder with a tokenizer."""
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_the_tokenizer_beside_is_taken_where_it_agrees(beside: Path) -> None:
    found = load(beside, ggml__pre="whatever it is called")
    assert found("def add").input_ids == tiny_tokenizer()("def add").input_ids
    load(beside, ggml__merges=None, ggml__eos_token_id=7, ends=(7, 8))


def swapped(name: str) -> list[str]:
    """Return a list of the header with two neighbours exchanged."""
    values = list(KEYS[f"tokenizer.ggml.{name}"])
    values[12], values[13] = values[13], values[12]
    return values


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"ggml__tokens": swapped("tokens")}, r"2 tokens differ .* beside it: 12 is '\+' in the f"),
        ({"ggml__merges": swapped("merges")}, "2 merges differ from those of the tokenizer besid"),
        ({"ggml__merges": KEYS["tokenizer.ggml.merges"][:-3]}, "3 merges differ from those of"),
        ({"ggml__add_bos_token": True}, "add_bos_token is True in the file, and False of the to"),
        ({"ggml__add_eos_token": True}, "add_eos_token is True in the file, and False of the to"),
        ({"ggml__bos_token_id": 5}, r"bos_token_id is 5 in the file, and \[1\] of the tokenizer"),
        ({"ggml__eos_token_id": 5}, r"eos_token_id is 5 in the file, and \[2\] of the tokenizer"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(
    beside: Path, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(CheckpointError, match=why) as refused:
        load(beside, **changes)
    assert "or none: then its own" in str(refused.value)


def test_tokens_that_only_fill_up_need_no_partner(beside: Path) -> None:
    more = [*KEYS["tokenizer.ggml.tokens"], "<extra>"]
    with pytest.raises(CheckpointError, match=f"1 tokens differ .*: {TOKENS} is '<extra>' in the"):
        load(beside, ggml__tokens=more)


def told(folder: Path, **changes: Any) -> list[str]:
    """Return what is said of a file beside JSON files."""
    keys = {f"tokenizer.{n.replace('__', '.')}": v for n, v in changes.items()}
    file = write_file(folder / "x.gguf", "llama", {**KEYS, **keys}, HALF)
    config = {"eos_token_id": [2, 3], "pad_token_id": 0}
    return list(gguf_tokenizer.other_than_beside(gguf_header.read(file), folder, config))


def test_ends_pads_and_templates_that_are_not_used_are_told(beside: Path) -> None:
    assert told(beside, ggml__eot_token_id=3) == []
    (ends,) = told(beside, ggml__eot_token_id=4)
    assert ends == "eot_token_id=4 of the file is not used, but eos_token_id=[2, 3]"
    (pad,) = told(beside, ggml__padding_token_id=4)
    assert pad == "padding_token_id=4 of the file is not used, but pad_token_id=0"
    (template,) = told(beside, chat_template="{{ 1 }}")
    assert template.startswith("the chat template of the file is not used")
    (beside / "generation_config.json").write_text(json.dumps({"eos_token_id": 4}))
    assert told(beside, ggml__eot_token_id=4) == []
