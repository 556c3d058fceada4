"""Every cache carries a conversation over, and several sequences together."""

from __future__ import annotations

import pytest

from tests.conftest import Build

CACHES = {
    "dynamic": (),
    "static": (),
    "sliding": ("cache.window=20",),
    "sinks": ("cache.window=20", "cache.sinks=2"),
    "fp8": (),
    "quantized": ("cache.group_size=8", "cache.residual=8"),
}
PAST_ALL_ALIKE = [name for name in CACHES if name != "quantized"]
"""Caches in which neither passes nor padding matter: groups of tokens begin elsewhere with them."""


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_turn_sends_only_what_is_new(build: Build, name: str, family: str) -> None:
    session = build(f"cache={name}", *CACHES[name], "decode.max_new_tokens=8", family=family)
    chat = session.chat()
    for message in ("def add(a, b):", "and now?"):
        for _ in chat.send(message):
            pass
    assert chat.receipt is not None
    assert chat.receipt.ok
    assert int(chat.receipt.evidence["from_cache"]) > 20


@pytest.mark.parametrize("name", PAST_ALL_ALIKE)
def test_a_turn_answers_as_the_whole_text_would(build: Build, name: str) -> None:
    session = build(f"cache={name}", *CACHES[name], "decode.max_new_tokens=8")
    chat = session.chat()
    for message in ("def add(a, b):", "and now?"):
        answer = chat.send(message)
        for _ in answer:
            pass
    anew = build(f"cache={name}", *CACHES[name], "decode.max_new_tokens=8").chat()
    first = anew.send("def add(a, b):")
    for _ in first:
        pass
    anew._values = None  # type: ignore[attr-defined]
    second = anew.send("and now?")
    for _ in second:
        pass
    assert second.output.token_ids == answer.output.token_ids


@pytest.mark.parametrize("name", PAST_ALL_ALIKE)
def test_a_padded_batch_answers_as_each_alone(build: Build, name: str) -> None:
    session = build(f"cache={name}", *CACHES[name], "decode.max_new_tokens=10")
    prompts = ["def add(a, b): return a + b  # the sum of both", "def"]
    for prompt, output in zip(prompts, session.generate(prompts), strict=True):
        assert output.token_ids == session.generate(prompt).token_ids
