"""task=text-generation: completion, templates, batches."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import CheckpointError, RecipeError
from tests.conftest import Build


def test_a_prompt_is_completed_as_it_is(build: Build) -> None:
    session = build("decode.max_new_tokens=5")
    expected = session.tokenizer("def add")["input_ids"]
    assert session.generate("def add").figures.prompt_tokens == len(expected)


def test_with_the_template_a_prompt_is_a_question(build: Build) -> None:
    session = build("task.chat_template=true", "decode.max_new_tokens=5")
    text = session.tokenizer.apply_chat_template(
        [{"role": "user", "content": "def add"}], tokenize=False, add_generation_prompt=True
    )
    expected = session.tokenizer(str(text), add_special_tokens=False)["input_ids"]
    output = session.generate("def add")
    assert output.figures.prompt_tokens == len(expected)
    chat = session.chat().send("def add")
    for _ in chat:
        pass
    assert output.token_ids == chat.output.token_ids


def test_a_template_that_is_not_there_is_refused(build: Build) -> None:
    session = build()
    session.tokenizer.chat_template = None
    from engine.contexts import TaskContext

    task = session.recipe.task
    task.chat_template = True
    with pytest.raises(RecipeError, match=r"no chat template[\s\S]*task.chat_template=false"):
        task.task(TaskContext(session=session))


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{% if %}", r"in line 1: TemplateSyntaxError"),
        ("{{ raise_exception('no users here') }}", r"TemplateError: no users here"),
        ("{{ 1 // 0 }}", r"ZeroDivisionError"),
        (5, r"TypeError"),
        ({"one": "a", "two": "b"}, r"ValueError"),
    ],
)
def test_a_template_that_fails_is_the_checkpoints_fault(
    build: Build, template: Any, cause: str
) -> None:
    session = build("task.chat_template=true", "decode.max_new_tokens=2")
    session.tokenizer.chat_template = template
    with pytest.raises(CheckpointError, match=rf"chat template.*{cause}[\s\S]*mend"):
        session.generate("def add")


def test_the_receipt_counts_what_went_through(build: Build) -> None:
    session = build()
    (receipt,) = session.recipe.task.receipts(session)
    assert receipt.ok
    assert receipt.evidence["probe_tokens"] == 9
    session.probe.tokens.clear()
    (receipt,) = session.recipe.task.receipts(session)
    assert not receipt.ok
