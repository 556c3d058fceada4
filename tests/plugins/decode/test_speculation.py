"""decode=assisted and decode=prompt-lookup: the same tokens, with guesses that are counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.decoding.loop import TokenDecoder
from engine.errors import CheckpointError
from engine.plugins.decode.assisted import Assisted
from engine.plugins.decode.generate import Generate
from engine.plugins.decode.prompt_lookup import PromptLookup, look_up
from tests.conftest import Build
from tests.models import tiny_model
from tests.plugins.decode.test_families import ROWS, Family, answers
from tests.plugins.helpers import priced, receipt


@pytest.fixture(scope="module")
def llama(model: Callable[[str], Path]) -> Family:
    return Family(model("llama"))


@pytest.mark.parametrize("rows", [ROWS[1:], [ROWS[1], ROWS[1]]])
def test_sampling_draws_what_it_draws_one_by_one(llama: Family, rows: list[list[int]]) -> None:
    options: dict[str, Any] = {"temperature": 0.9, "top_k": 30, "repetition_penalty": 1.1}
    expected, _ = answers(TokenDecoder(Generate(**options), llama.context), llama.ask(rows[:1]))
    found, last = answers(llama.assisted(**options), llama.ask(rows))
    assert found[0] == expected[0]
    assert last.drafted > last.accepted
    assert last.discarded == last.drafted - last.accepted
    if len(rows) == 2:
        assert found[1] != found[0]  # rows draw with seeds of their own


def test_a_reader_that_leaves_in_the_middle_leaves_nothing_unread_in_the_cache(
    llama: Family,
) -> None:
    for read in range(1, 8):
        generation = llama.ask([ROWS[1]])
        steps: Any = llama.assisted(num_draft_tokens=6)(generation)
        for _ in range(read):
            next(steps)
        steps.close()
        assert generation.cache is not None
        assert generation.cache.get_seq_length() == len(ROWS[1]) + read - 1


def test_recording_ends_with_the_answer(model: Callable[[str], Path]) -> None:
    """A window that still recorded would be cut wrongly, in silence, by the next turn."""
    mistral = Family(model("mistral"))
    generation = mistral.ask([ROWS[1]])
    answers(mistral.assisted(), generation)
    cache: Any = generation.cache
    assert not any(layer.record_past for layer in cache.layers)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)


def test_the_end_may_come_in_the_middle_of_guesses(llama: Family) -> None:
    (free,), _ = answers(llama.assisted(num_draft_tokens=6), llama.ask([ROWS[1]]))
    end = next(token for place, token in enumerate(free) if place > 3 and token not in free[:place])
    context = llama.context.__class__(**{**vars(llama.context), "end_ids": frozenset({end})})
    decoder = llama.assisted(num_draft_tokens=6)
    decoder.context = context
    (found,), _ = answers(decoder, llama.ask([ROWS[1]]))
    assert found == free[: free.index(end) + 1]


def test_a_stop_string_ends_an_answer_and_its_passes(
    model: Callable[[str], Path], build: Build
) -> None:
    words = ("decode=assisted", f"decode.draft={model('llama')}", "decode.max_new_tokens=40")
    free = build(*words).generate("def add")
    session = build(*words, f"decode.stop=[{free.text[5:8]!r}]")
    stopped, (together, _) = session.generate("def add"), session.generate(["def add", "x"])
    assert stopped.finish_reason == together.finish_reason == "stop"
    assert stopped.text == together.text == free.text[: free.text.index(free.text[5:8])]
    assert stopped.figures.forwarded_tokens < 30


def test_look_up() -> None:
    def drafts(ids: list[int], most: int = 3, longest: int = 2) -> list[int]:
        found: list[int] = look_up(torch.tensor([ids]), most, longest)[0].tolist()
        return found

    assert drafts([1, 2, 3, 4, 5, 1, 2]) == [3, 4, 5]
    assert drafts([1, 2, 3, 9, 2, 7, 8, 6, 1, 2]) == [3, 9, 2]  # two tokens tell more than one
    assert drafts([1, 2, 3, 9, 2, 7, 8, 6, 1, 2], longest=1) == [7, 8, 6]  # the last place counts
    assert drafts([4, 4, 4]) == [4]  # no place has three behind it
    assert drafts([1, 2, 3]) == drafts([1]) == drafts([1, 2, 1], most=0) == []


def test_a_session_reports_and_proves_its_guesses(
    model: Callable[[str], Path], build: Build
) -> None:
    plain = build("decode.max_new_tokens=30").generate("def add")
    session = build("decode=assisted", f"decode.draft={model('llama')}", "decode.max_new_tokens=30")
    output = session.generate("def add")
    figures = output.figures
    assert output.token_ids == plain.token_ids
    assert figures.drafted_tokens == figures.accepted_tokens == 23  # a draft that is the model
    assert plain.figures.drafted_tokens is None
    evidence: Any = receipt(session, "decode").evidence
    assert evidence["accepted"] == evidence["drafted"] == evidence["of these its own"]
    assert evidence["passes through the model"] < evidence["tokens of a short run"]
    assert evidence["equal to one by one"] == evidence["tokens of a short run"]
    chat = session.chat()
    for message in ("hello", "and you?"):
        list(chat.send(message))
        assert chat.receipt is not None
        assert chat.receipt.ok


def codes(*words: str, family: Path) -> list[str]:
    recipe = engine.compose("base", [f"model.path={family}", *words])
    return [problem.code for problem in engine.check(recipe).problems]


def test_refusals(model: Callable[[str], Path], tmp_path: Path) -> None:
    llama = model("llama")
    good = ("decode=assisted", f"decode.draft={llama}")
    assert codes(*good, family=llama) == []
    assert codes(*good, "cache=none", family=llama) == []
    assert codes("decode=assisted", family=llama) == ["value"]
    assert codes("decode=assisted", "decode.draft=./nowhere", family=llama) == ["draft"]
    assert codes(*good, "decode.num_draft_tokens=0", family=llama) == ["value"]
    assert codes(*good, "cache=static", family=llama) == ["speculation-static-cache"]
    assert codes("decode=prompt-lookup", "cache=static", family=llama) == [
        "speculation-static-cache"
    ]
    assert codes("decode=prompt-lookup", "decode.max_ngram=0", family=llama) == ["value"]
    assert codes("decode=prompt-lookup", family=model("qwen3_next")) == [
        "speculation-recurrent-model"
    ]
    other = tiny_model("llama", tmp_path)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"et"', '"qq"'))
    assert codes("decode=assisted", f"decode.draft={other}", family=llama) == ["draft-vocabulary"]


def test_the_draft_is_priced(model: Callable[[str], Path]) -> None:
    words = [f"model.path={model('llama')}", "model.dtype=float32", "decode=assisted"]
    recipe = engine.compose("base", [*words, f"decode.draft={model('llama')}"])
    terms = priced(engine.check(recipe))
    assert terms["draft weights"] == terms["weights"]
    assert terms["draft KV cache"] == terms["KV cache"]


def test_rows_of_a_used_batch_cache_are_refused(llama: Family) -> None:
    generation = llama.ask(ROWS)
    llama.model(generation.input_ids, past_key_values=generation.cache, use_cache=True)
    with pytest.raises(engine.errors.RuntimeFailure, match="row by row"):
        list(llama.assisted()(generation))


def test_a_lookup_that_finds_nothing_proves_itself_all_the_same(build: Build) -> None:
    session = build("decode=prompt-lookup", "decode.max_ngram=3")
    evidence: Any = receipt(session, "decode").evidence
    assert evidence["drafted"] > evidence["accepted"] > 0
    assert Assisted(draft="x").provides == PromptLookup().provides == ("decode.assisted",)


def test_a_draft_without_a_tokenizer_says_so(build: Build, tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="there is no tokenizer that can be used") as refused:
        build("decode=assisted", f"decode.draft={folder}")
    assert "tokenizer.json" in refused.value.problems[0].hint


def test_states_alone_take_no_drafts(tmp_path: Path) -> None:
    folder = tiny_model("lfm2", tmp_path, layer_types=["conv", "conv"])
    for decode in ("decode=prompt-lookup", f"decode=assisted decode.draft={folder}"):
        words = [f"model.path={folder}", *decode.split()]
        found = engine.check(engine.compose("base", words)).problems
        assert "speculation-recurrent-model" in {each.code for each in found}
