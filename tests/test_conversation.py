"""Chats of many turns: the cache carries over, and nothing is silently wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import engine
from engine.contexts import Generation
from engine.conversation import Conversation
from engine.errors import RecipeError, RuntimeFailure
from engine.generate import capacity
from engine.session import Session
from tests import plain
from tests.conftest import Build
from tests.models import tiny_model

TURNS = ["hello", "and you?", "once more, with feeling"]


def _fresh(session: Session, ids: list[int], new: int) -> list[int]:
    """Return the tokens of a run that has no cache to get wrong."""
    return plain.greedy(Path(session.recipe.model.path), ids, new, use_cache=False)


def _converse(session: Session) -> Iterator[tuple[Conversation, list[int], list[int]]]:
    chat = Conversation(session)
    for turn in TURNS:
        stream = chat.send(turn)
        for _ in stream:
            pass
        ids = chat._ids[: -len(stream.output.token_ids)]
        yield chat, ids, stream.output.token_ids


@pytest.mark.parametrize("message", [None, 5, "half a character: \ud800"])
def test_what_is_no_text_is_refused(build: Build, message: Any) -> None:
    with pytest.raises(RuntimeFailure, match="a prompt is text"):
        build().chat().send(message)


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_each_turn_equals_a_fresh_run(build: Build, cache: str, family: str) -> None:
    session = build(f"cache={cache}", "decode.max_new_tokens=6", family=family)
    for _, ids, new in _converse(session):
        assert new == _fresh(session, ids, len(new))


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "lfm2", "qwen3_next", "bloom"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "sinks", "sliding"])
@pytest.mark.parametrize("decode", ["generate", "prompt-lookup"])
def test_each_turn_equals_a_fresh_run_or_is_refused(
    build: Build, cache: str, decode: str, family: str
) -> None:
    words = [f"cache={cache}", f"decode={decode}", "decode.max_new_tokens=6"]
    try:
        session = build(*words, family=family)
    except RecipeError as refusal:
        pytest.skip(f"refused: {refusal.problems[0].message}")
    for chat, ids, new in _converse(session):
        assert new == _fresh(session, ids, len(new))
        assert chat.receipt is not None
        assert chat.receipt.ok
        assert chat.receipt.claim == (
            "this turn processed only what was new"
            if len(chat.messages) > 2
            else "this turn processed everything: the conversation begins"
        )


def test_keys_of_other_frequencies_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LongRoPE rotates a long text otherwise: keys of the short one do not fit it."""
    positions = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 128,
    }
    folder = tiny_model("llama", tmp_path, rope_parameters=positions, max_position_embeddings=512)
    words = [f"model.path={folder}", "model.dtype=float32", "decode.max_new_tokens=6"]
    session = engine.build(engine.compose("base", words))
    turns = ["many words, " * 8, "more words, and " * 4, "end"]

    def right() -> list[bool]:
        found = []
        chat = Conversation(session)
        for turn in turns:
            stream = chat.send(turn)
            for _ in stream:
                pass
            new = stream.output.token_ids
            given = torch.tensor([chat._ids[: -len(new)]])
            model: Any = session.model
            expected = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=6, do_sample=False
            )
            found.append(new == expected[0, given.shape[1] :].tolist())
            assert chat.receipt is not None
            assert chat.receipt.ok
        assert len(chat._ids) > 128
        return found

    assert right() == [True] * 3
    monkeypatch.setattr("engine.conversation.frequency_set", lambda *_: 0)
    assert right() != [True] * 3
    session.close()


def test_beams_begin_each_turn_anew(build: Build) -> None:
    session = build("decode=beam", "decode.max_new_tokens=6")
    for chat, _, _ in _converse(session):
        assert chat.receipt is not None
        assert chat.receipt.evidence["from_cache"] == 0
        begun = len(chat.messages) == 2
        why = "the conversation begins" if begun else "beams leave a cache of their own"
        assert chat.receipt.claim.endswith(why)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_each_turn_processes_only_its_new_tokens(build: Build, cache: str) -> None:
    session = build(f"cache={cache}", "decode.max_new_tokens=6")
    seen = 0
    for chat, ids, new in _converse(session):
        receipt = chat.receipt
        assert receipt is not None
        assert receipt.ok
        # The last token of an answer has not been through the model yet.
        assert receipt.evidence["from_cache"] == max(0, seen - 1)
        assert receipt.evidence["forwarded"] == len(ids) - max(0, seen - 1) + len(new) - 1
        seen = len(ids) + len(new)


def test_a_broken_off_answer_leaves_the_next_turn_right(build: Build) -> None:
    session = build("decode.max_new_tokens=20")
    chat = Conversation(session)
    stream = chat.send("hello")
    for count, _ in enumerate(stream):
        if count == 2:
            break
    stream.close()
    answer = chat.send("go on")
    for _ in answer:
        pass
    ids = chat._ids[: -len(answer.output.token_ids)]
    assert answer.output.token_ids == _fresh(session, ids, len(answer.output.token_ids))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_template_that_rewrites_history_is_followed(build: Build, cache: str) -> None:
    """Some templates add to the last message: what was processed is no longer what is asked."""
    session = build(f"cache={cache}", "decode.max_new_tokens=6")
    session.tokenizer.chat_template = (
        "{% for m in messages %}{{ 'now ' if loop.last }}{{ m['role'] }} says {{ m['content'] }}\n"
        "{% endfor %}reply:"
    )
    for _, ids, new in _converse(session):
        assert new == _fresh(session, ids, len(new))


def test_the_same_message_again_is_not_fed_twice(build: Build) -> None:
    """A cache that covers the whole prompt makes `generate` feed everything again, wrongly."""
    session = build("decode.max_new_tokens=6")
    chat = Conversation(session)
    answers = []
    for _ in range(3):
        chat.messages.clear()
        stream = chat.send("exactly this")
        for _ in stream:
            pass
        answers.append(stream.output.token_ids)
        assert chat.receipt is not None
        assert chat.receipt.ok
    assert answers[0] == answers[1] == answers[2]


def test_a_static_cache_grows_when_a_conversation_does(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.conversation.FIRST_CACHE_TOKENS", 8)
    session = build("cache=static", "decode.max_new_tokens=4")
    sizes = []
    for chat, ids, new in _converse(session):
        assert new == _fresh(session, ids, len(new))
        assert chat._values is not None
        sizes.append(capacity(chat._values.cache, None) or 0)
    assert sizes[0] < sizes[-1]


def test_a_conversation_beyond_the_context_is_refused(build: Build) -> None:
    session = build("decode.max_new_tokens=4")
    chat = Conversation(session)
    with pytest.raises(RuntimeFailure, match="128"):
        _talk_on(chat)
    assert len(chat.messages) % 2 == 0, "a refused message is not part of the conversation"


def _talk_on(chat: Conversation) -> None:
    for turn in range(40):
        for _ in chat.send(f"turn {turn} with some words in it"):
            pass


@pytest.mark.parametrize("size", [40, 80])
def test_a_window_is_not_cut_short_by_a_static_cache(size: int, tmp_path: Path) -> None:
    """A layer narrower than its window drops tokens that the model still attends to."""
    folder = tiny_model("mistral", tmp_path, sliding_window=64)
    words = ["cache=static", f"cache.max_tokens={size}", "decode.max_new_tokens=12"]
    recipe = engine.compose("base", [f"model.path={folder}", "model.dtype=float32", *words])
    with engine.build(recipe) as session:
        room = capacity(session.new_cache(1, 128).cache, 64)
        assert room == (40 if size == 40 else None)
        output = session.generate("hello")
        ids = list(session.tokenizer("hello")["input_ids"])
        assert output.token_ids == plain.greedy(folder, ids, 12)
        if room is not None:
            with pytest.raises(RuntimeFailure, match="cache holds 40"):
                session.generate("a prompt of more than forty tokens, by far and away")
        long = session.generate("hello hello hello") if room else None
        assert long is None or long.figures.prompt_tokens + long.figures.new_tokens <= 40


def test_an_answer_that_was_not_read_is_broken_off(build: Build) -> None:
    session = build("decode.max_new_tokens=30")
    chat = Conversation(session)
    first = chat.send("hello")
    next(first)
    second = chat.send("and you?")
    for _ in second:
        pass
    assert list(first) == []
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    ids = chat._ids[: -len(second.output.token_ids)]
    assert second.output.token_ids == _fresh(session, ids, len(second.output.token_ids))


def test_a_message_counts_when_its_answer_is_read(build: Build) -> None:
    session = build("decode.max_new_tokens=4")
    chat = Conversation(session)
    chat.send("never read")
    chat.send("closed at once").close()
    for _ in chat.send("hello"):
        pass
    assert [message["content"] for message in chat.messages[:1]] == ["hello"]
    assert len(chat.messages) == 2


def test_a_capped_cache_still_carries_over(build: Build) -> None:
    words = ["cache=static", "cache.max_tokens=120", "decode.max_new_tokens=128"]
    session = build(*words)
    decoder = session.built["decode"]
    session.built["decode"] = lambda generation: decoder(replace(generation, max_new_tokens=6))
    chat = Conversation(session)
    for turn in TURNS[:2]:
        for _ in chat.send(turn):
            pass
    assert chat.receipt is not None
    assert chat.receipt.claim == "this turn processed only what was new"
    assert int(chat.receipt.evidence["from_cache"]) > 0


def test_the_tail_is_tokenized_in_its_place() -> None:
    """Some tokenizers mark the beginning of a text: a tail on its own would be marked as well."""
    letters = {letter: index for index, letter in enumerate("\u2581helobyx")}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    kind: Any = PreTrainedTokenizerFast
    tokenizer = kind(tokenizer_object=backend)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = Conversation.__new__(Conversation)
    chat._session = cast(Session, SimpleNamespace(tokenizer=tokenizer))
    chat._ids = list(tokenizer("hello")["input_ids"])
    ids, _ = chat._tokens(
        [{"role": "user", "content": "hello"}, {"role": "user", "content": "bye"}]
    )
    assert ids == list(tokenizer("hellobye")["input_ids"])


def test_a_turn_after_one_that_never_began_is_no_contradiction(build: Build) -> None:
    session = build("decode.max_new_tokens=4")
    chat = Conversation(session)
    chat.send("never read")
    for _ in chat.send("hello"):
        pass
    assert chat.receipt is not None
    assert chat.receipt.ok
    assert chat.receipt.claim.endswith("nothing of it was kept before")


def test_feeding_everything_again_is_a_contradiction(build: Build) -> None:
    session = build("decode.max_new_tokens=4")
    decoder = session.built["decode"]

    def wasteful(generation: Generation) -> Iterator[list[int]]:
        with torch.no_grad():
            session.model(input_ids=generation.input_ids, use_cache=False)
        yield from list(decoder(generation))

    chat = Conversation(session)
    for _ in chat.send("hello"):
        pass
    session.built["decode"] = lambda generation: map(list, wasteful(generation))
    for _ in chat.send("and you?"):
        pass
    assert chat.receipt is not None
    assert not chat.receipt.ok


def test_a_template_that_wants_parts_gets_them(build: Build) -> None:
    """It made nothing of text, and the model never saw what was said."""
    session = build("decode.max_new_tokens=6")
    session.tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {% for part in m['content'] %}"
        "{{ part['text'] }}{% endfor %}</s>\n{% endfor %}{% if add_generation_prompt %}"
        "<s>assistant: {% endif %}"
    )
    for chat, ids, new in _converse(session):
        said = str(session.tokenizer.decode(ids))
        assert all(message["content"] in said for message in chat.messages[:-1])
        assert new == _fresh(session, ids, len(new))


def test_words_without_a_token_are_told(build: Build) -> None:
    session = build("decode.max_new_tokens=2", "task.chat_template=true")
    session.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u20ac", "")
    alone, rows = session.generate("a \u20ac b"), session.generate(["a \u20ac b", "a b"])
    stream = session.chat().send("a \u20ac b")
    for _ in stream:
        pass
    for output in (alone, rows[0], stream.output):
        (note,) = output.notes
        assert "cannot tell it of all of the prompt: '\u20ac'" in note
    assert not rows[1].notes
