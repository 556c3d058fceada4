"""A session as a Python user meets it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

import engine
from engine.calls import Chosen
from engine.errors import PluginError, RecipeError, RuntimeFailure
from engine.hooks import Hooks
from tests import plain
from tests.conftest import Build


def test_a_stream_gives_pieces_then_its_output(build: Build) -> None:
    session = build("decode.max_new_tokens=12")
    stream = session.stream("def add")
    text = "".join(stream)
    assert stream.output.text == text
    ids = list(session.tokenizer("def add")["input_ids"])
    assert stream.output.token_ids == plain.greedy(Path(session.recipe.model.path), ids, 12)
    figures = stream.output.figures
    assert figures.new_tokens == 12
    assert figures.forwarded_tokens == figures.prompt_tokens + 11
    assert figures.tokens_per_second is not None
    assert figures.tokens_per_second > 0
    assert figures.seconds >= figures.time_to_first_token > 0
    assert figures.peak_memory_bytes > 1_000_000


def test_a_batch_gives_what_each_prompt_gives_alone(build: Build) -> None:
    session = build("decode.max_new_tokens=10")
    prompts = ["a", "def add(a, b):", "two words"]
    together = session.generate(prompts)
    alone = [session.generate(prompt) for prompt in prompts]
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert [output.text for output in together] == [output.text for output in alone]


def test_closing_a_stream_stops_it(build: Build) -> None:
    session = build("decode.max_new_tokens=100")
    stream = session.stream("def add")
    next(iter(stream))
    stream.close()
    forwarded = session.forwarded_tokens
    assert forwarded < 90
    assert session.generate("def add").figures.new_tokens == 100
    assert session.forwarded_tokens > forwarded


def test_a_prompt_beyond_the_context_is_refused_with_numbers(build: Build) -> None:
    session = build()
    limit = session.context_tokens
    assert limit == 128
    with pytest.raises(RuntimeFailure, match=r"the prompt has \d+ tokens.*128"):
        session.stream("x" * 500)


def test_the_context_ends_an_answer_exactly(build: Build) -> None:
    session = build("decode.max_new_tokens=500")
    output = session.generate("def add")
    assert output.finish_reason in ("context", "stop")
    if output.finish_reason == "context":
        assert output.figures.prompt_tokens + output.figures.new_tokens == 128


def test_a_full_static_cache_is_refused_with_what_to_type(build: Build) -> None:
    session = build("cache=static", "cache.max_tokens=16", "decode.max_new_tokens=8")
    with pytest.raises(RuntimeFailure, match=r"cache holds 16[\s\S]*cache.max_tokens="):
        session.generate("a much longer prompt than sixteen tokens can hold, by far")


def test_sampling_repeats_with_its_seed_and_differs_with_another(build: Build) -> None:
    words = ["decode.max_new_tokens=20", "decode.temperature=1.5"]
    one, two, other = build(*words), build(*words), build(*words, "seed=7")
    first = one.generate("def add").token_ids
    assert first == one.generate("def add").token_ids == two.generate("def add").token_ids
    assert first != other.generate("def add").token_ids


def test_stop_strings_cut_the_text(build: Build) -> None:
    plain = build("decode.max_new_tokens=30").generate("def add")
    stop = plain.text[3:5]
    session = build("decode.max_new_tokens=30", f"decode.stop=[{stop!r}]")
    output = session.generate("def add")
    assert output.text == plain.text[: plain.text.index(stop)]
    assert output.finish_reason == "stop"


def test_an_empty_prompt_is_refused(build: Build) -> None:
    with pytest.raises(RuntimeFailure, match="empty"):
        build().stream("")


def test_two_sessions_do_not_meet(build: Build) -> None:
    first = build("attention=eager", "decode.max_new_tokens=8")
    expected = first.generate("def add").token_ids
    second = build("attention=sdpa", "heads=grouped", "heads.num_key_value_heads=1")
    second.generate("def add")
    assert first.model.config._attn_implementation == "eager"
    assert first.generate("def add").token_ids == expected


def test_closing_gives_the_model_back(build: Build) -> None:
    before = set(AttentionInterface._global_mapping)
    session = build()
    session.generate("def add")
    model = weakref.ref(session.model)
    session.close()
    gc.collect()
    assert model() is None
    assert set(AttentionInterface._global_mapping) == before


@pytest.mark.parametrize("packing", ["nf4", "int8", "torchao-int8", "quanto-int8"])
def test_closing_frees_packed_weights_at_once(build: Build, packing: str) -> None:
    session = build(f"quantize={packing}", "model.dtype=bfloat16")
    weights = [weakref.ref(each) for each in session.model.parameters()]
    gc.disable()
    try:
        session.close()
    finally:
        gc.enable()
    assert not [each for each in weights if each() is not None]


def test_a_failing_build_leaves_nothing_behind(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.receipts._contradictions", lambda *_: 1 / 0)
    before = set(AttentionInterface._global_mapping)
    with pytest.raises(ZeroDivisionError):
        build()
    assert set(AttentionInterface._global_mapping) == before
    monkeypatch.undo()
    assert build("decode.max_new_tokens=2").generate("def add").token_ids


def test_not_finite_logits_stop_the_build(tmp_path: Path) -> None:
    from tests.models import tiny_model

    folder = tiny_model("llama", tmp_path / "overflowing")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38)
    model.save_pretrained(folder)
    with pytest.raises(RuntimeFailure, match=r"logits .* NaN or infinite"):
        engine.build(engine.compose("base", [f"model.path={folder}", "model.dtype=float32"]))


def test_receipts_cover_every_slot_and_hold(build: Build) -> None:
    session = build()
    slots = [receipt.slot for receipt in session.receipts]
    assert slots == sorted(slots, key=slots.index)
    assert set(slots) == {
        "load", "quantize", "heads", "position_encoding", "attention", "cache", "decode", "task",
    }  # fmt: skip
    assert all(receipt.ok and receipt.evidence for receipt in session.receipts)


def test_a_model_without_template_refuses_to_converse(build: Build) -> None:
    session = build()
    session.tokenizer.chat_template = None
    with pytest.raises(RecipeError, match="no chat template"):
        session.chat()


def test_a_decoder_that_breaks_is_named(build: Build) -> None:
    session = build()

    def broken(generation: object) -> object:
        raise KeyError("lost")

    session.built["decode"] = broken
    with pytest.raises(PluginError, match=r"decode=generate \(recipe-engine .*KeyError"):
        session.generate("def add")


def test_the_tokenizer_says_what_ends_an_answer_when_the_model_does_not(build: Build) -> None:
    session = build()
    assert session.end_ids == {2}
    session.model.generation_config.eos_token_id = None
    session.tokenizer.eos_token = "<s>"
    del session.__dict__["end_ids"]
    assert session.end_ids == {1}


USES: list[Callable[[engine.Session], object]] = [
    lambda session: session.stream("x"),
    lambda session: session.generate("x"),
    lambda session: session.generate(["x"]),
    lambda session: session.chat(),
    lambda session: session.collect_receipts(),
    lambda session: session.model,
    lambda session: session.tokenizer,
]


def test_a_closed_session_says_so(build: Build) -> None:
    session = build()
    stream = session.stream("def add")
    session.close()
    session.close()
    for use in USES:
        with pytest.raises(RuntimeFailure, match=r"session is closed[\s\S]*engine.build"):
            use(session)
    with pytest.raises(RuntimeFailure, match="session is closed"):
        next(iter(stream))


@pytest.mark.parametrize("prompt", [None, 5, b"def", {"a"}, "half \ud83d", ["fine", None]])
def test_a_prompt_that_is_no_text_is_refused_as_such(build: Build, prompt: Any) -> None:
    session = build()
    with pytest.raises(RuntimeFailure, match="a prompt is text"):
        session.generate(prompt)
    with pytest.raises(RuntimeFailure, match="a prompt is text"):
        session.stream(prompt)


def test_a_tuple_of_prompts_is_a_batch(build: Build) -> None:
    session = build("decode.max_new_tokens=3")
    outputs = session.generate(("a", "b"))
    assert [output.token_ids for output in outputs] == [
        output.token_ids for output in session.generate(["a", "b"])
    ]


class Leaving:
    @engine.hookimpl
    def observe(self, event: object) -> None:
        raise GeneratorExit


class Waiting:
    @engine.hookimpl
    async def observe(self, event: object) -> None:
        raise AssertionError


def test_a_generator_exit_of_a_hook_is_the_plugins(build: Build) -> None:
    session = build("decode.max_new_tokens=3")
    session.hooks = Hooks([*session.hooks.chosen, Chosen("observe", "leaving", Leaving())])
    with pytest.raises(PluginError, match=r"observe=leaving .*raised GeneratorExit"):
        session.generate("def add")


def test_an_async_hook_is_refused_when_it_is_registered() -> None:
    with pytest.raises(PluginError, match=r"observe=waiting .*'async def'.*not awaited[\s\S]*def"):
        Hooks([Chosen("observe", "waiting", Waiting())])
