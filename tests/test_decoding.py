"""What a decoder owes its readers: own randomness, exact stops, honest figures, a prompt end."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from engine import hookimpl
from engine.calls import Chosen
from engine.contexts import Event, Generation
from engine.errors import RuntimeFailure
from engine.hooks import Hooks
from engine.session import Session
from tests.conftest import Build

LONG = "decode.max_new_tokens=100"
SAMPLED = ("decode.max_new_tokens=20", "decode.temperature=1.5")


def pace(session: Session, seconds: float = 0.01) -> list[int]:
    """Make each pass through the model take `seconds` at least; the list grows with each."""
    passes: list[int] = []

    def slow(*_: Any) -> None:
        time.sleep(seconds)
        passes.append(1)

    session.model.register_forward_pre_hook(slow)
    return passes


@dataclass
class Witness:
    """Remember the events."""

    events: ClassVar[list[Event]] = []

    @hookimpl
    def observe(self, event: Event) -> None:
        self.events.append(event)


def watched(session: Session) -> list[Event]:
    Witness.events.clear()
    session.hooks = Hooks([*session.hooks.chosen, Chosen("observe", "witness", Witness())])
    return Witness.events


# -- randomness -----------------------------------------------------------------------------------


def test_overlapping_sessions_sample_what_they_sample_alone(build: Build) -> None:
    one, other = build(*SAMPLED), build(*SAMPLED, "seed=7")
    expected = [session.generate("def add").token_ids for session in (one, other)]
    streams = [session.stream("def add") for session in (one, other)]
    for stream in streams:
        next(iter(stream))
    for stream in streams:
        list(stream)
    assert [stream.output.token_ids for stream in streams] == expected


def test_the_callers_own_randomness_neither_disturbs_nor_is_disturbed(build: Build) -> None:
    session = build(*SAMPLED)
    expected = session.generate("def add").token_ids
    torch.manual_seed(3)
    own = [torch.rand(1).item() for _ in range(20)]
    torch.manual_seed(3)
    stream = session.stream("def add")
    drawn = [torch.rand(1).item() for _ in stream]
    assert stream.output.token_ids == expected
    assert drawn == own[: len(drawn)]


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_generating_leaves_the_random_state_alone(build: Build, temperature: float) -> None:
    session = build("decode.max_new_tokens=5", f"decode.temperature={temperature}")
    before = torch.get_rng_state()
    session.generate(["def add", "x"])
    assert torch.equal(torch.get_rng_state(), before)


# -- ends -----------------------------------------------------------------------------------------


def test_a_stop_string_is_looked_for_in_new_text_only(build: Build) -> None:
    free = build("decode.max_new_tokens=8")
    prompts = ["hello", "def add(a, b)"]
    expected = free.generate(prompts)
    stop = prompts[0][-1] + expected[0].text[0]
    assert stop not in expected[0].text
    session = build("decode.max_new_tokens=8", f"decode.stop=[{stop!r}]")
    assert session.generate(prompts[0]).token_ids == expected[0].token_ids
    found = session.generate(prompts)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert [one.finish_reason for one in found] == ["length", "length"]


def test_nothing_is_generated_behind_a_stop(build: Build) -> None:
    free = build(LONG).generate("def add")
    stop = free.text[4:6]
    session = build(LONG, f"decode.stop=[{stop!r}]")
    passes = pace(session, 0)
    stream = session.stream("def add")
    text = next(iter(stream))
    time.sleep(0.5)  # a reader that looks late must not let the model run on
    text += "".join(stream)
    assert text == stream.output.text == free.text[: free.text.index(stop)]
    assert stream.output.finish_reason == "stop"
    assert len(passes) == len(stream.output.token_ids) < 20
    assert stream.output.token_ids == free.token_ids[: len(passes)]


def test_rows_of_a_batch_stop_where_they_stop_alone(build: Build) -> None:
    prompts = ["def add", "x", "two words"]
    stop = build(LONG).generate(prompts[0]).text[4:6]
    session = build(LONG, f"decode.stop=[{stop!r}]")
    alone = [session.generate(prompt) for prompt in prompts]
    passes = pace(session, 0)
    together = session.generate(prompts)
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.finish_reason for one in together] == [one.finish_reason for one in alone]
    assert len(passes) == max(len(one.token_ids) for one in together)


@pytest.mark.parametrize("batch", [False, True])
def test_a_decoder_that_knows_no_stop_is_closed_at_it(build: Build, batch: bool) -> None:
    free = build(LONG).generate("def add")
    stop = free.text[4:6]
    session = build(LONG, f"decode.stop=[{stop!r}]")
    closed = []

    def decoder(generation: Generation) -> Iterator[list[int]]:
        try:
            for token in free.token_ids:
                yield [token] * len(generation.input_ids)
        finally:
            closed.append(True)

    session.built["decode"] = decoder
    found = session.generate(["def add", "def add"])[1] if batch else session.generate("def add")
    assert closed == [True]
    assert found.text == free.text[: free.text.index(stop)]
    assert found.finish_reason == "stop"
    assert len(found.token_ids) < 20


def test_stream_and_batch_end_alike_when_tokenizer_and_model_disagree(build: Build) -> None:
    free = build("decode.max_new_tokens=30").generate("def add").token_ids
    first = [token for place, token in enumerate(free) if token not in free[:place]]
    models, tokenizers = first[-1], first[-2]
    session = build("decode.max_new_tokens=30")
    session.model.generation_config.eos_token_id = models
    del session.__dict__["end_ids"]
    decoder = session.built["decode"]
    decoder.context = replace(decoder.context, end_ids=session.end_ids)
    session.tokenizer.eos_token = session.tokenizer.convert_ids_to_tokens(tokenizers)
    alone, (together, _) = session.generate("def add"), session.generate(["def add", "x"])
    assert alone.token_ids == together.token_ids == free[: free.index(models) + 1]
    assert alone.text == together.text
    assert alone.finish_reason == together.finish_reason == "stop"


def test_a_turn_that_stops_at_a_string_still_proves_its_cache(build: Build) -> None:
    expected = build("decode.max_new_tokens=40").chat().send("hello")
    text = "".join(expected)
    session = build("decode.max_new_tokens=40", f"decode.stop=[{text[4:6]!r}]")
    chat = session.chat()
    for message in ("hello", "and you?"):
        for _ in chat.send(message):
            pass
        assert chat.receipt is not None
        assert chat.receipt.ok


# -- closing --------------------------------------------------------------------------------------


def test_closing_a_session_stops_what_runs(build: Build) -> None:
    session = build(LONG)
    passes = pace(session, 0.02)
    stream = session.stream("def add")
    next(iter(stream))
    session.close()
    done = len(passes)
    assert done < 50
    with pytest.raises(RuntimeFailure, match="closed"):
        list(stream)
    time.sleep(0.1)
    assert len(passes) == done


def test_a_stream_that_begins_after_closing_says_so(build: Build) -> None:
    session = build(LONG)
    stream = session.stream("def add")
    session.close()
    with pytest.raises(RuntimeFailure, match="closed"):
        next(iter(stream))


def test_closing_stops_what_runs_in_another_thread(build: Build) -> None:
    session = build(LONG)
    passes = pace(session, 0.02)
    first, second = session.stream("def add"), session.stream("x")
    next(iter(first))
    refused: list[str] = []

    def wait() -> None:
        with pytest.raises(RuntimeFailure, match="closed") as caught:
            list(second)
        refused.append(str(caught.value))

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.1)
    session.close()
    done = len(passes)
    waiting.join(5)
    assert len(refused) == 1
    assert len(passes) == done < 50


def test_a_stream_forgotten_in_a_cycle_cannot_stop_another(build: Build) -> None:
    """The garbage collector may run in the middle of a step, and close a stream of the session."""
    session = build(LONG)
    stream: Any = session.stream("def add")

    pace(session, 0.005)
    collected: list[int] = []

    def collect(*_: Any) -> None:
        if not collected:
            collected.append(gc.collect())

    next(stream)
    del stream
    session.model.register_forward_pre_hook(collect)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(session.generate("x")), daemon=True)
    asking.start()
    asking.join(60)
    assert len(answers) == 1


@pytest.mark.parametrize("grad", [True, False])
def test_the_readers_state_of_gradients_is_its_own(build: Build, grad: bool) -> None:
    session = build("decode.max_new_tokens=5")
    with torch.set_grad_enabled(grad):
        for _ in session.stream("def add"):
            assert torch.is_grad_enabled() is grad
    assert torch.is_grad_enabled()


# -- figures --------------------------------------------------------------------------------------


def test_interleaved_streams_count_their_own_tokens(build: Build) -> None:
    session = build("decode.max_new_tokens=12")
    streams = [session.stream("def add"), session.stream("a longer prompt than that")]
    expected = [session.generate("def add"), session.generate("a longer prompt than that")]
    for stream in streams:
        next(iter(stream))
    for stream in streams:
        list(stream)
    for stream, alone in zip(streams, expected, strict=True):
        assert stream.output.token_ids == alone.token_ids
        figures = stream.output.figures
        assert figures.forwarded_tokens == figures.prompt_tokens + 11
        assert figures.forwarded_tokens == alone.figures.forwarded_tokens


def test_two_threads_on_one_session_get_their_own_answers(build: Build) -> None:
    session = build("decode.max_new_tokens=12")
    prompts = ["def add", "x", "two words", "a longer prompt than that"]
    expected = {prompt: session.generate(prompt) for prompt in prompts}
    found = {}

    def ask(prompt: str) -> None:
        found[prompt] = session.generate(prompt)

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt, output in found.items():
        assert output.token_ids == expected[prompt].token_ids
        assert output.figures.forwarded_tokens == expected[prompt].figures.forwarded_tokens
    assert set(found) == set(prompts)


def test_a_plain_decoder_is_counted_while_it_is_asked(build: Build) -> None:
    session = build("decode.max_new_tokens=3")

    def decoder(generation: Generation) -> Iterator[list[int]]:
        for _ in range(generation.max_new_tokens):
            logits = session.model(input_ids=generation.input_ids, use_cache=False).logits
            yield [int(logits[0, -1].argmax())]

    session.built["decode"] = decoder
    streams = [session.stream("def add"), session.stream("a longer prompt than that")]
    for _ in range(3):
        for stream in streams:
            next(iter(stream), None)
    for stream in streams:
        list(stream)
        figures = stream.output.figures
        assert figures.forwarded_tokens == 3 * figures.prompt_tokens


def test_a_slow_reader_does_not_make_the_model_slow(build: Build) -> None:
    session = build("decode.max_new_tokens=8")
    pace(session, 0.005)
    session.generate("def add")
    stream = session.stream("def add")
    for _ in stream:
        time.sleep(0.1)
    figures = stream.output.figures
    assert figures.tokens_per_second is not None
    assert figures.tokens_per_second > 15  # 10 at the pace of the reader
    assert figures.seconds < 0.6


def test_figures_of_a_batch_are_each_rows_own_where_they_can_be(build: Build) -> None:
    prompts = ["def add", "a longer prompt than that"]
    free = build("decode.max_new_tokens=40")
    short, long = (free.generate(prompt) for prompt in prompts)
    stop = next(
        short.text[at : at + 2] for at in range(20) if short.text[at : at + 2] not in long.text
    )
    session = build("decode.max_new_tokens=40", f"decode.stop=[{stop!r}]")
    pace(session)
    early, late = (output.figures for output in session.generate(prompts))
    assert early.prompt_tokens < late.prompt_tokens
    assert early.new_tokens < late.new_tokens == 40
    assert early.seconds < late.seconds
    assert early.time_to_first_token == late.time_to_first_token
    for row in (early, late):
        decoding = row.seconds - row.time_to_first_token
        assert row.tokens_per_second == pytest.approx((row.new_tokens - 1) / decoding)
    assert early.forwarded_tokens == late.forwarded_tokens == 2 * (late.prompt_tokens + 39)


# -- observers ------------------------------------------------------------------------------------


def test_observers_hear_of_a_batch_that_fails(build: Build) -> None:
    session = build()
    events = watched(session)

    def broken(generation: Generation) -> Iterator[list[int]]:
        raise RuntimeFailure("no luck")

    session.built["decode"] = broken
    with pytest.raises(RuntimeFailure, match="no luck"):
        session.generate(["def add", "x"])
    assert [event.kind for event in events] == ["started", "failed"]
    assert events[-1].data == {"error": "RuntimeFailure: no luck"}


def test_a_cache_that_does_not_come_through_is_refused(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with transformers 5.24, which calls it otherwise: every token was computed anew."""
    session = build()
    model: Any = session.model
    whole = model.generate

    def renaming(*given: Any, custom_generate: Any, **options: Any) -> Any:
        def take(*given: Any, **prepared: Any) -> Any:
            return custom_generate(*given, cache=prepared.pop("past_key_values"), **prepared)

        return whole(*given, custom_generate=take, **options)

    monkeypatch.setattr(model, "generate", renaming)
    with pytest.raises(RuntimeFailure, match="does not hand the cache on"):
        session.generate("def add")
