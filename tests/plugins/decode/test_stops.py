"""Every decoder ends at a stop string, be it text, a special token, or both."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import Build
from tests.models import VOCABULARY, tiny_config, tiny_tokenizer

END = "<|im_end|>"
SAID = f"abc{END}xyzw"


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model that says 'abc<|im_end|>xyzw' behind a Q."""
    folder = tmp_path_factory.mktemp("script")
    tokenizer: Any = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [END]})
    chain = tokenizer(f"Q{SAID}", add_special_tokens=False)["input_ids"]
    config = tiny_config(
        "llama",
        vocab_size=VOCABULARY + 8,
        hidden_size=VOCABULARY + 8,
        num_hidden_layers=1,
        intermediate_size=8,
        tie_word_embeddings=False,
    )
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():  # one row of the last layer answers one token, and nothing else counts
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY + 8))
        model.lm_head.weight.zero_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for before, after in itertools.pairwise(chain):
            model.lm_head.weight[after, before] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


STOPS = {END: "abc", f"c{END}": "ab", f"{END}xy": "abc", "cx": "abcxyzw", "yz": "abcx"}


def ask(build: Build, script: Path, stop: str, *words: str) -> Any:
    given = (f"model.path={script}", "decode.max_new_tokens=8", f"decode.stop=['{stop}']", *words)
    return build(*given)


@pytest.mark.parametrize("decode", ["generate", "prompt-lookup", "beam", "assisted"])
@pytest.mark.parametrize("stop", STOPS)
def test_it_ends_there(build: Build, script: Path, decode: str, stop: str) -> None:
    draft = [f"decode.draft={script}"] if decode == "assisted" else []
    session = ask(build, script, stop, f"decode={decode}", *draft)
    alone, rows = session.generate("Q"), session.generate(["Q", "aQ"])
    assert [alone.text, *(row.text for row in rows)] == [STOPS[stop]] * 3
    assert "".join(session.stream("Q")) == STOPS[stop]
    assert alone.finish_reason == ("stop" if STOPS[stop] != "abcxyzw" else "length")
    assert not any("never comes" in note for note in session.notes)


def test_a_compiled_step_ends_there(build: Build, script: Path) -> None:
    session = ask(build, script, f"{END}x", "decode=compiled", "cache=static")
    assert session.generate("Q").text == "abc"


@pytest.mark.parametrize("stop", STOPS)
def test_it_ends_where_transformers_does(build: Build, script: Path, stop: str) -> None:
    tokens = ask(build, script, stop).generate("Q").token_ids
    auto: Any = AutoModelForCausalLM
    tokenizer: Any = AutoTokenizer.from_pretrained(script)
    model = auto.from_pretrained(script, dtype=torch.float32, attn_implementation="eager")
    ids = tokenizer("Q", return_tensors="pt")
    out = model.generate(
        **ids, max_new_tokens=8, do_sample=False, stop_strings=[stop], tokenizer=tokenizer
    )
    assert tokens == out[0, ids["input_ids"].shape[1] :].tolist()


def test_one_that_never_comes_is_told(build: Build, tmp_path: Path, script: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(script)
    backend = tokenizer.backend_tokenizer
    backend.decoder = None  # tokens apart by spaces, as words are
    for file in script.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    session = ask(build, tmp_path, "bc", f"decode.stop=['bc','c',{END!r}]")
    assert [note for note in session.notes if note.startswith("decode.stop")] == [
        "decode.stop: 'bc' never comes, for no tokens of this model make it"
    ]
