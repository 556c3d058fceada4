"""task.prefix: computed once, shared by prompts, and never another answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine import registry
from engine.encoding import encode
from engine.errors import CheckpointError, RecipeError, RuntimeFailure
from engine.session import Session
from tests import plain
from tests.conftest import Build
from tests.models import tiny_model

PREFIX = "A text that all prompts begin with, "
PROMPTS = ["def add(", "and", "x = 1, y = 2"]
WORDS = (f"task.prefix='{PREFIX}'", "decode.max_new_tokens=6")

CACHES = [name for name in registry.installed()["cache"] if name != "offloaded"]


def _reference(session: Session, prompt: str) -> list[int]:
    ids = list(session.tokenizer(PREFIX + prompt)["input_ids"])
    return plain.greedy(Path(session.recipe.model.path), ids, 6)


def _shared(session: Session) -> Any:
    return session.built["task"].shared


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize(
    "family", ["llama", "gemma3", "gpt2", "bloom", "deepseek_v3", "gpt_oss", "lfm2", "qwen3_next"]
)
def test_tokens_are_those_of_the_whole_text(build: Build, cache: str, family: str) -> None:
    try:
        session = build(*WORDS, f"cache={cache}", family=family)
    except RecipeError as refusal:
        pytest.skip(f"refused: {refusal.problems[0].message}")
    expected = [_reference(session, prompt) for prompt in PROMPTS]
    assert [session.generate(prompt).token_ids for prompt in PROMPTS] == expected
    assert [output.token_ids for output in session.generate(PROMPTS)] == expected
    assert [output.token_ids for output in session.generate([PROMPTS[0]] * 2)] == expected[:1] * 2


@pytest.mark.parametrize("cache", CACHES)
def test_no_cache_answers_otherwise_than_without_sharing(build: Build, cache: str) -> None:
    """Those that would, for they round or forget, recompute, and say so."""
    session = build(*WORDS, f"cache={cache}")
    whole = build(f"cache={cache}", "decode.max_new_tokens=6")
    prompts = [PREFIX + prompt for prompt in PROMPTS]
    assert [session.generate(prompt).token_ids for prompt in PROMPTS] == [
        whole.generate(prompt).token_ids for prompt in prompts
    ]
    assert [output.token_ids for output in session.generate(PROMPTS)] == [
        output.token_ids for output in whole.generate(prompts)
    ]
    receipt = session.recipe.task.receipts(session)
    *_, last = receipt
    assert last.ok
    assert bool(_shared(session).refused) == ("computed for each prompt" in last.claim)
    assert (int(last.evidence["tokens not forwarded again"]) > 0) == (not _shared(session).refused)


@pytest.mark.parametrize("decode", ["prompt-lookup", "beam"])
def test_other_decoders_answer_as_without_sharing(build: Build, decode: str) -> None:
    session = build(*WORDS, f"decode={decode}")
    whole = build(f"decode={decode}", "decode.max_new_tokens=6")
    assert bool(_shared(session).refused) == (decode == "beam")
    for prompt in PROMPTS:
        assert session.generate(prompt).token_ids == whole.generate(PREFIX + prompt).token_ids


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_weights_that_round_by_the_pass_answer_as_without_sharing(
    build: Build, family: str
) -> None:
    int8 = ("quantize=bitsandbytes", "quantize.bits=8")
    session = build(*WORDS, *int8, family=family)
    whole = build(*int8, "decode.max_new_tokens=6", family=family)
    assert "depends on all tokens of a pass" in _shared(session).refused
    (_, receipt) = session.recipe.task.receipts(session)
    assert "depends on all tokens of a pass" in receipt.claim
    assert receipt.ok
    for prompt in PROMPTS:
        assert session.generate(prompt).token_ids == whole.generate(PREFIX + prompt).token_ids


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_only_the_prompts_own_tokens_go_through_the_model(build: Build, cache: str) -> None:
    session = build(*WORDS, f"cache={cache}")
    shared = _shared(session)
    held = len(shared)
    assert held > 20
    before = session.forwarded_tokens
    for prompt in PROMPTS:
        figures = session.generate(prompt).figures
        kept = figures.prompt_tokens + figures.new_tokens - 1 - figures.forwarded_tokens
        assert kept >= held - 2  # where the seam is tokenized otherwise, the prefix is cut back
    told = session.forwarded_tokens - before
    assert told < sum(len(PREFIX + prompt) for prompt in PROMPTS)
    (_, receipt) = session.recipe.task.receipts(session)
    assert receipt.ok
    assert receipt.evidence["prompts that began with a copy"] == len(PROMPTS)
    assert int(receipt.evidence["tokens not forwarded again"]) >= len(PROMPTS) * (held - 2)


def test_a_batch_shares_the_columns_that_all_rows_have(build: Build) -> None:
    session = build(*WORDS)
    held = len(_shared(session))
    before = session.forwarded_tokens
    outputs = session.generate(PROMPTS)
    longest = max(output.figures.prompt_tokens for output in outputs)
    sent = session.forwarded_tokens - before
    assert sent <= 3 * (longest - (held - 2) + 5)


def test_a_seam_that_is_tokenized_otherwise_is_cut_back(build: Build) -> None:
    """'…e' and 'n…' are one token together, and two apart."""
    for cache in ("dynamic", "static"):
        session = build("task.prefix='begin the'", "decode.max_new_tokens=4", f"cache={cache}")
        tokenizer = session.tokenizer
        whole = list(tokenizer("begin then")["input_ids"])
        assert (
            whole[: len(tokenizer("begin the")["input_ids"])] != tokenizer("begin the")["input_ids"]
        )
        expected = plain.greedy(Path(session.recipe.model.path), whole, 4)
        assert session.generate("n").token_ids == expected
        assert session.generate("n").token_ids == expected


def test_the_copy_is_not_written_to(build: Build) -> None:
    session = build(*WORDS)
    shared = _shared(session)
    before = shared.cache.layers[0].keys.clone()
    session.generate(PROMPTS)
    session.generate("more")
    assert shared.cache.layers[0].keys.equal(before)


def test_a_prompt_that_is_cut_into_the_prefix_is_refused_when_too_long(build: Build) -> None:
    with pytest.raises(RuntimeFailure, match=r"the prompt has \d+ tokens; the model has positions"):
        build(f"task.prefix='{'abc ' * 100}'")
    with pytest.raises(RuntimeFailure, match="cache holds 16"):
        build(*WORDS, "cache=static", "cache.max_tokens=16")


def test_with_the_template_it_is_the_system_message(build: Build) -> None:
    session = build(*WORDS, "task.chat_template=true")
    messages = [{"role": "system", "content": PREFIX}, {"role": "user", "content": "hello"}]
    text = session.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = list(session.tokenizer(str(text), add_special_tokens=False)["input_ids"])
    output = session.generate("hello")
    assert output.token_ids == plain.greedy(Path(session.recipe.model.path), ids, 6)
    assert output.figures.forwarded_tokens < len(ids)
    chat = session.chat()
    stream = chat.send("hello")
    for _ in stream:
        pass
    assert stream.output.token_ids == output.token_ids
    assert stream.output.figures.forwarded_tokens == output.figures.forwarded_tokens


def test_a_template_without_system_messages_is_told_while_building(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    def refusing(*_: Any, **__: Any) -> str:
        raise ValueError("no system messages here")

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", refusing)
    with pytest.raises(CheckpointError, match="no system messages here"):
        build(*WORDS, "task.chat_template=true")
    session = build(*WORDS)  # which completes text
    with pytest.raises(CheckpointError, match="no system messages here"):
        session.chat()


def test_a_template_that_leaves_the_prefix_out_is_refused(build: Build, tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)
    template = (
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    words = (*WORDS, f"model.path={folder}")
    with pytest.raises(CheckpointError, match=r"leaves out[\s\S]*task\.prefix=null"):
        build(*words, "task.chat_template=true")
    with pytest.raises(CheckpointError, match=r"leaves out[\s\S]*task\.prefix=null"):
        build(*words).chat()
    assert build(*words[1:], "task.chat_template=true").generate("hello").token_ids


def test_a_prefix_that_is_not_in_the_prompt_fails_its_receipt(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = build(*WORDS)
    task: Any = session.built["task"]
    (_, receipt) = session.recipe.task.receipts(session)
    assert receipt.ok
    assert receipt.evidence["its text is in the prompt"] is True
    monkeypatch.setattr(task, "_encoded", lambda prompt: encode(session.tokenizer, prompt))
    (_, receipt) = session.recipe.task.receipts(session)
    assert not receipt.ok


def test_an_empty_prefix_is_refused(build: Build) -> None:
    with pytest.raises(RecipeError, match=r"task\.prefix is empty"):
        build("task.prefix=''")


def test_a_prompt_that_is_nothing_but_the_prefix_leaves_a_token_to_compute(build: Build) -> None:
    session = build(*WORDS)
    shared = _shared(session)
    ids = list(session.tokenizer(PREFIX)["input_ids"])[: len(shared)]
    cache = shared.begin(ids)
    assert cache is not None
    assert cache.get_seq_length() == len(ids) - 1
