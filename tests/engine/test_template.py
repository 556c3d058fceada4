"""Chat templates of the kinds that models ship: every word arrives, or the run is refused."""

from __future__ import annotations

from typing import Any, cast

import pytest
from transformers import PreTrainedTokenizerBase

from engine.encoding import encode
from engine.errors import CheckpointError
from engine.template import holds, render, try_out
from tests.engine.decoding.test_stop_strings import pieces, word_pieces
from tests.models import tiny_tokenizer

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + PROMPT
)
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}"
)
PARTS = (
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
)

KEEP: dict[str, Any] = {
    "chatml": CHATML,
    "trimmed": CHATML.replace("m.content", "m.content | trim"),
    "system in the first question": (
        "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>' ~ messages[0].content ~ "
        "'<</SYS>>' %}{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        + ALTERNATE
        + "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ system if loop.first }}"
        "{{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    ),
    "system in the last question": (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content ~ '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}"
        "{% endif %}{% for m in rest %}{% if m.role == 'user' %}[INST] {{ system if loop.last }}"
        "{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    ),
    "a system message of its own": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Tiny.<|im_end|>\n"
        "{% endif %}" + CHATML
    ),
    "a date and tools": (
        "{% set date = strftime_now('%d %b %Y') if strftime_now is defined else '' %}"
        "{% if tools is not none and tools %}{{ tools | tojson }}{% endif %}Today: {{ date }}\n"
        + CHATML
    ),
    "thoughts left out of earlier answers": (
        "{% set ns = namespace(last=-1) %}{% for m in messages[::-1] %}{% if ns.last < 0 and "
        "m.role == 'user' %}{% set ns.last = messages | length - 1 - loop.index0 %}{% endif %}"
        "{% endfor %}{% for m in messages %}{% set content = m.content %}{% if m.role == "
        "'assistant' and '</think>' in content and loop.index0 < ns.last %}{% set content = "
        "content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>{{ m.role }}\n"
        "{{ content }}<|im_end|>\n{% endfor %}" + PROMPT + "<think>\n"
    ),
    "thoughts by another mark": CHATML.replace(
        "m.content", "m.content.split('[/THINK]')[-1] if m.role == 'assistant' else m.content"
    ),
    "text or parts": CHATML.replace(
        "{{ m.content }}",
        "{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}",
    ),
    "parts alone": CHATML.replace("{{ m.content }}", PARTS),
    "the first part alone": CHATML.replace("{{ m.content }}", "{{ m['content'][0]['text'] }}"),
    "parts that a filter picks": CHATML.replace(
        "{{ m.content }}",
        "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}",
    ),
    "blank unless in parts": CHATML.replace(
        "{{ m.content }}", "{% if m.content is not string %}" + PARTS + "{% endif %}"
    ),
    "parts for questions, text for the rest": CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'user' %}" + PARTS + "{% else %}{{ '' ~ m.content }}{% endif %}",
    ),
    "generation markers": CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}",
    ),
    "macros": (
        "{% macro say(m) %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endmacro %}"
        "{% for m in messages %}{{ say(m) }}{% endfor %}<|start|>assistant"
    ),
    "instructions": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == "
        "'user' %}### Instruction:\n{{ m.content }}\n\n{% else %}### Response:\n{{ m.content }}\n\n"
        "{% endif %}{% endfor %}### Response:\n"
    ),
    "other names of roles": (
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n"
    ),
    "loops with break": (
        "{% for m in messages %}{% if m.role == 'tool' %}{% break %}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    ),
    "by name": {"default": CHATML, "tool_use": "{{ tools }}"},
}

LOSE = {
    "no system role": CHATML.replace("in messages", "in messages if m.role != 'system'"),
    "system roles refused": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + CHATML
    ),
    "roles that must alternate": ALTERNATE + CHATML,
    "the last message alone": "{{ messages[-1].content }}",
    "no answers": CHATML.replace("in messages", "in messages if m.role != 'assistant'"),
    "no questions": CHATML.replace("in messages", "in messages if m.role != 'user'"),
    "other letters": CHATML.replace("m.content", "m.content | upper"),
    "escaped": CHATML.replace("m.content", "m.content | e"),
    "cut": CHATML.replace("m.content", "m.content[:12]"),
    "the end alone": CHATML.replace("m.content", "m.content[-12:]"),
    "another key": CHATML.replace("m.content", "m.text"),
    "no conversation": "Hello",
}
TAKES_NO_SYSTEM = {"no system role", "system roles refused", "roles that must alternate"}

SAYS = ["Speak as a < pirate >", "what is  seven?\n\nSay it", "Arr, it is 7", "a"]
MESSAGES = [
    {"role": role, "content": text}
    for role, text in zip(["system", "user", "assistant", "user"], SAYS, strict=True)
]


def tokenizer_with(template: Any) -> PreTrainedTokenizerBase:
    tokenizer = cast(PreTrainedTokenizerBase, tiny_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("kind", KEEP)
def test_every_word_arrives(kind: str) -> None:
    tokenizer = tokenizer_with(KEEP[kind])
    try_out(tokenizer, system=SAYS[0], turns=2)
    text = render(tokenizer, MESSAGES)
    assert all(holds(text, words) for words in SAYS)
    assert render(tokenizer, MESSAGES[1:2]).count("seven") == 1


@pytest.mark.parametrize("kind", LOSE)
def test_words_that_would_be_lost_are_refused(kind: str) -> None:
    tokenizer = tokenizer_with(LOSE[kind])
    with pytest.raises(CheckpointError, match="chat template") as refusal:
        render(tokenizer, MESSAGES)
    (problem,) = refusal.value.problems
    no_system = kind in TAKES_NO_SYSTEM
    assert no_system == ("task.prefix=null" in problem.hint)
    if no_system:
        assert holds(render(tokenizer, MESSAGES[1:]), SAYS[1])
    if kind != "the end alone":
        with pytest.raises(CheckpointError):
            try_out(tokenizer, system=SAYS[0], turns=2)


def test_short_words_that_stand_there_by_chance_are_not_taken_for_the_message() -> None:
    messages = [{"role": "system", "content": "user"}, {"role": "user", "content": "hello"}]
    with pytest.raises(CheckpointError, match="leaves out what the system says: 'user'"):
        render(tokenizer_with(LOSE["no system role"]), messages)


def test_who_is_left_out_is_told() -> None:
    with pytest.raises(CheckpointError, match="leaves out what the system says: 'Speak as"):
        render(tokenizer_with(LOSE["no system role"]), MESSAGES)
    with pytest.raises(CheckpointError, match="leaves out what the assistant says"):
        render(tokenizer_with(LOSE["no answers"]), MESSAGES)


@pytest.mark.parametrize(
    ("kind", "answer", "kept"),
    [
        ("thoughts left out of earlier answers", "<think>hm</think>\n\nSeven.", "Seven."),
        ("thoughts left out of earlier answers", "Seven.", "Seven."),
        ("thoughts left out of earlier answers", "<think>cut short", "<think>cut short"),
        ("thoughts left out of earlier answers", "<think>hm</think>", ""),
        ("thoughts by another mark", "[THINK]hm[/THINK]Seven.", "Seven."),
    ],
)
def test_thoughts_may_be_left_out(kind: str, answer: str, kept: str) -> None:
    messages = [*MESSAGES[:2], {"role": "assistant", "content": answer}, MESSAGES[3]]
    text = render(tokenizer_with(KEEP[kind]), messages)
    assert holds(text, kept)
    assert ("hm" in text) == ("hm" in kept)


@pytest.mark.parametrize(
    "left_out", ["m.content.split('. ')[-1]", "m.content.split('</b>')[0]", "m.content[9:]"]
)
def test_no_more_than_thoughts_may_be_left_out(left_out: str) -> None:
    template = CHATML.replace("m.content", f"{left_out} if m.role == 'assistant' else m.content")
    answer = {"role": "assistant", "content": "One is a lie. Two <b>is</b> so."}
    with pytest.raises(CheckpointError, match="assistant says"):
        render(tokenizer_with(template), [MESSAGES[1], answer, MESSAGES[3]])


# -- from text to tokens --------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "def add", "\u20ac \U0001f600\n\n  x", "<s>a</s>", "e\u0301"])
def test_all_of_a_text_has_tokens(text: str) -> None:
    for tokenizer in (tokenizer_with(CHATML), pieces(byte_fallback=True)):
        found = encode(tokenizer, text, add_special_tokens=False)
        assert found.unread == found.notes == []
        assert len(found.spans) == len(found.ids)


@pytest.mark.parametrize(
    ("text", "unread"),
    [
        ("stop here", []),
        ("Stop [UNK] here", []),
        ("stop \u20ac here zebra", ["\u20ac", "zebra"]),
        ("wow zebra", ["wow zebra"]),
        ("\u20ac", ["\u20ac"]),
    ],
)
def test_what_has_no_token_is_told(text: str, unread: list[str]) -> None:
    found = encode(word_pieces(), text)
    assert found.unread == unread
    assert len(found.notes) == bool(unread)
    assert all(repr(part) in found.notes[0] for part in unread)


def test_letters_that_are_dropped_are_told() -> None:
    """A BPE without a token for the unknown leaves them out."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])))
    assert encode(tokenizer, "abxab").unread == ["x"]


def test_a_tokenizer_that_tells_no_places_names_the_unknown() -> None:
    slow: Any = word_pieces()
    slow.__class__ = type("Slow", (type(slow),), {"is_fast": False})
    assert encode(slow, "stop zebra").unread == ["[UNK]"]
    assert encode(slow, "stop").unread == []
