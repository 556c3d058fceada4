"""Chats of many turns: the cache carries over, and nothing is silently wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.conversation import Conversation
from engine.errors import RuntimeFailure
from engine.generate import capacity
from engine.session import Session
from tests import plain
from tests.conftest import Build

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


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_each_turn_equals_a_fresh_run(build: Build, cache: str, family: str) -> None:
    session = build(f"cache={cache}", "decode.max_new_tokens=6", family=family)
    for _, ids, new in _converse(session):
        assert new == _fresh(session, ids, len(new))


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
    """Some templates drop old reasoning: what was processed is then no longer what is asked."""
    session = build(f"cache={cache}", "decode.max_new_tokens=6")
    session.tokenizer.chat_template = (
        "{% for m in messages[-1:] %}{{ m['role'] }} says {{ m['content'] }}\n{% endfor %}reply:"
    )
    for _, ids, new in _converse(session):
        assert new == _fresh(session, ids, len(new))


def test_the_same_message_again_is_not_fed_twice(build: Build) -> None:
    """A cache that covers the whole prompt makes `generate` feed everything again, wrongly."""
    session = build("decode.max_new_tokens=6")
    session.tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    chat = Conversation(session)
    answers = []
    for _ in range(3):
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
        sizes.append(capacity(chat._values.cache) or 0)
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
