"""Render messages with a checkpoint's chat template, and see that every word arrives.

A template is a program of the checkpoint's. It may fail, and it may leave out what it is given: a
role that it does not know, or text where it expects a list of parts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""A role and its content."""

MARK = "zqxj{}vkw"
"""A word for each message, which nothing else in a prompt holds."""

CLOSING = re.compile(r"(</[^<>]*>|<[^<>]*\|>|\[/[^\[\]]*\]) ?")
"""The end of a block of thought, which templates leave out of earlier answers."""

MEND = (
    "mend chat_template.jinja, or chat_template in tokenizer_config.json; engine run with "
    "task.chat_template=false completes text without it"
)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Return the text that `messages` become, up to where the model's answer begins.

    Content goes in as text, or as a list of parts where the template wants that.

    Raises:
        CheckpointError: when the chat template does not parse, refuses the messages, or leaves out
            what one of them says.
    """
    plain = _attempt(tokenizer, messages, in_parts=())
    if plain.whole:
        return plain.text
    others = [
        _attempt(tokenizer, messages, in_parts)
        for in_parts in (plain.lost, range(len(messages)))
        if in_parts
    ]
    for attempt in others:
        if attempt.whole:
            return attempt.text
    for attempt in (plain, *others):
        if attempt.failure is None:
            raise _left_out(tokenizer, messages, attempt.lost[0])
    assert plain.failure is not None
    raise _failed(tokenizer, messages, plain.failure) from plain.failure


def try_out(
    tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, turns: int = 1
) -> None:
    """Render a short conversation, so that a broken template is told at once.

    Raises:
        CheckpointError: as `render`.
    """
    talk = [("user", "Hello"), ("assistant", "Hello, you"), ("user", "Goodbye")][: 2 * turns - 1]
    first = [] if system is None else [("system", system)]
    render(tokenizer, [{"role": role, "content": words} for role, words in [*first, *talk]])


def holds(text: str, words: str) -> bool:
    """Tell whether a text has these words in it, however they are spaced."""
    return _spaced(words) in _spaced(text)


@dataclass(frozen=True)
class _Attempt:
    """What came of rendering messages, some of them as lists of parts."""

    text: str = ""
    lost: Sequence[int] = ()
    """Messages that are not in the text as they were said."""
    failure: Exception | None = None

    @property
    def whole(self) -> bool:
        return self.failure is None and not self.lost


def _attempt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], in_parts: Collection[int]
) -> _Attempt:
    # Short words may stand in a text by chance, so each must come through with a mark as well.
    marks = [MARK.format(index) for index in range(len(messages))]
    marked = [
        {**message, "content": f"{message['content']} {mark}"}
        for message, mark in zip(messages, marks, strict=True)
    ]
    try:
        text, with_marks = (_rendered(tokenizer, each, in_parts) for each in (messages, marked))
    except Exception as error:  # whatever it likes: a template is a program
        return _Attempt(failure=error)
    lost = [
        index
        for index, message in enumerate(messages)
        if marks[index] not in with_marks
        or re.search(rf"{marks[index]}['\"]}}", with_marks)  # a list, printed as it is
        or not _arrives(message, text)
    ]
    return _Attempt(text, lost)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], in_parts: Collection[int]
) -> str:
    given: list[dict[str, Any]] = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if index in in_parts
        else dict(message)
        for index, message in enumerate(messages)
    ]
    return str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True))


def _arrives(message: Message, text: str) -> bool:
    """Tell whether a message is in a prompt; of an answer, all behind its thoughts."""
    said, there = _spaced(message["content"]), _spaced(text)
    if said in there or message["role"] != "assistant":
        return said in there
    missing, high = 0, len(said)
    while missing < high:  # how much of its beginning is not there
        middle = (missing + high) // 2
        missing, high = (missing, middle) if said[middle:] in there else (middle + 1, high)
    # Part of the closing mark may be there by chance.
    return any(end.start() <= missing <= end.end() for end in CLOSING.finditer(said))


def _spaced(text: str) -> str:
    """Return a text with single spaces: templates trim what they are given."""
    return " ".join(text.split())


def _left_out(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], lost: int
) -> CheckpointError:
    role, words = messages[lost]["role"], _spaced(messages[lost]["content"])
    return _refusal(
        tokenizer,
        messages,
        f"the chat template of the model leaves out what the {role} says: {words!r:.60} is not in "
        "the prompt that it makes",
        "chat-template-loses",
    )


def _failed(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], error: Exception
) -> CheckpointError:
    line = getattr(error, "lineno", None)
    place = f" in line {line}" if line else ""
    cause = next(iter(str(error).splitlines()), "")
    return _refusal(
        tokenizer,
        messages,
        f"the chat template of the model fails{place}: {type(error).__name__}: {cause}",
        "chat-template",
    )


def _refusal(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], message: str, code: str
) -> CheckpointError:
    hint = MEND
    if messages[0]["role"] == "system" and _works(tokenizer, _in_one(messages)):
        hint = "it takes no system message: task.prefix=null, and say it in the first message"
    where = str(tokenizer.name_or_path)
    return CheckpointError(Problem(message=message, hint=hint, code=code, where=where))


def _in_one(messages: Sequence[Message]) -> Sequence[Message]:
    """Return messages whose first says what a system message said before it."""
    system, first, *rest = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def _works(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> bool:
    try:
        render(tokenizer, messages)
    except CheckpointError:
        return False
    return True
