"""The tiny models are what other tests take them for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import FAMILIES, SPECIAL, VOCABULARY, tiny_model


def greedy(folder: Path, prompt: str, count: int = 32) -> list[int]:
    auto: Any = AutoModelForCausalLM
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    output = auto.from_pretrained(folder).generate(ids, max_new_tokens=count, do_sample=False)
    tokens: list[int] = output[0, ids.shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_neither_ends_nor_repeats_one_token(family: str, tmp_path: Path) -> None:
    tiny_model(family, tmp_path)
    for prompt in ("def add(", "Hello, my name is", "0123"):
        tokens = greedy(tmp_path, prompt)
        assert len(tokens) == 32
        assert SPECIAL["</s>"] not in tokens
        assert len(set(tokens)) > 3


def test_the_seed_decides(tmp_path: Path) -> None:
    first, same, other = (tmp_path / name for name in ("first", "same", "other"))
    tiny_model("llama", first)
    torch.rand(7)
    tiny_model("llama", same)
    tiny_model("llama", other, seed=1)
    bytes_of = [(path / "model.safetensors").read_bytes() for path in (first, same, other)]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_survives_saving(family: str, tmp_path: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model(family, tmp_path))
    text = "def add(a, b):\n    return a + b  # héllo 你好\t"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<s>the</s>")["input_ids"][0] == SPECIAL["<s>"]
    assert max(tokenizer.get_vocab().values()) == VOCABULARY - 1
    chat = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<s>user: hi</s>\n<s>assistant: "
