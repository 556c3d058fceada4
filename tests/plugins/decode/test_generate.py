"""decode=generate gives what model.generate gives, by the recipe alone, and stops as it should."""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache

from engine.contexts import CheckContext, DecodeContext, Generation
from engine.decoding.loop import TokenDecoder
from engine.plugins.decode.generate import Generate
from tests.conftest import Build
from tests.plugins.helpers import IDS, plain, receipt, verdict


@pytest.fixture(scope="module")
def llama(model: Callable[[str], Path]) -> Any:
    return plain(model("llama"))


@pytest.fixture
def decoder(llama: Any, model: Callable[[str], Path]) -> Iterator[Callable[..., TokenDecoder]]:
    tokenizer: Any = AutoTokenizer.from_pretrained(model("llama"))
    made: list[TokenDecoder] = []

    def make(seed: int = 0, end: int = 2, **options: Any) -> TokenDecoder:
        context = DecodeContext(
            model=llama, tokenizer=tokenizer, seed=seed, end_ids=frozenset({end})
        )
        found: Any = Generate(**options).decode(context)
        made.append(found)
        return made[-1]

    yield make
    for each in made:
        each.close()


def hints(plugin: Generate, seed: int = 0) -> list[str]:
    """Return what a plugin's check says to type instead."""
    recipe: Any = SimpleNamespace(seed=seed)
    target: Any = None
    context = CheckContext(
        recipe=recipe, shape=None, reshaped=None, target=target, traits=frozenset()
    )
    return [problem.hint for problem in plugin.check(context)]


def ask(ids: torch.Tensor = IDS, new: int = 20, cache: Any = None) -> Generation:
    mask = (ids != 0).long()
    return Generation(input_ids=ids, attention_mask=mask, cache=cache, max_new_tokens=new)


def test_greedy_gives_what_model_generate_gives(
    decoder: Callable[..., TokenDecoder], llama: Any
) -> None:
    reference = llama.generate(
        IDS, attention_mask=torch.ones_like(IDS), do_sample=False, max_new_tokens=20
    )[0, 8:].tolist()
    for cache in (None, DynamicCache(config=llama.config)):
        assert list(decoder()(ask(cache=cache))) == [[token] for token in reference]


def test_sampling_gives_what_model_generate_gives(
    decoder: Callable[..., TokenDecoder], llama: Any
) -> None:
    options = {
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
    }
    torch.manual_seed(5)
    reference = llama.generate(
        IDS, attention_mask=torch.ones_like(IDS), do_sample=True, max_new_tokens=20, **options
    )[0, 8:].tolist()
    sampled = decoder(seed=5, **options)
    assert list(sampled(ask())) == [[token] for token in reference]
    assert list(sampled(ask())) == [[token] for token in reference]  # seeded each time
    assert list(decoder(seed=6, **options)(ask())) != [[token] for token in reference]


def test_no_limit_means_no_limit(decoder: Callable[..., TokenDecoder]) -> None:
    """transformers would quietly sample from the 50 likeliest only."""
    for options in ({}, {"top_p": 1.0}):
        sampler = decoder(temperature=1.0, **options).sampler(torch.device("cpu"))
        assert sampler is not None
        assert sampler.limits == []


def test_a_batch_yields_a_list_per_step_and_padding_at_the_end(
    decoder: Callable[..., TokenDecoder],
) -> None:
    ids = torch.cat([IDS, torch.tensor([[0, 0, 0, 7, 8, 9, 10, 11]])])
    free = list(decoder()(ask(ids)))
    assert all(len(step) == 2 for step in free)
    end = next(step[0] for step in free[2:] if step[0] not in [s[1] for s in free])
    ended = list(decoder(end=end)(ask(ids)))
    rows = [[step[row] for step in ended] for row in (0, 1)]
    stop = rows[0].index(end)
    assert set(rows[0][stop + 1 :]) == {0}
    assert rows[1] == [step[1] for step in free]


def test_defaults_of_the_checkpoint_do_not_leak_in(
    decoder: Callable[..., TokenDecoder], llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(decoder()(ask()))
    own = llama.generation_config
    for name, value in {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 3,
        "repetition_penalty": 3.0,
        "suppress_tokens": [expected[0][0]],
        "no_repeat_ngram_size": 2,
        "num_beams": 4,
        "max_length": 9,
        "min_new_tokens": 3,
    }.items():
        monkeypatch.setattr(own, name, value)
    assert list(decoder()(ask())) == expected
    assert llama.generation_config is own  # and is back in its place


def test_closing_stops(decoder: Callable[..., TokenDecoder], llama: Any) -> None:
    cache = DynamicCache(config=llama.config)
    steps: Any = decoder()(ask(new=100_000, cache=cache))
    next(steps)
    started = time.perf_counter()
    steps.close()
    assert time.perf_counter() - started < 5
    held = cache.get_seq_length()
    time.sleep(0.05)
    assert cache.get_seq_length() == held < 50_000


def test_it_runs_in_the_readers_thread(decoder: Callable[..., TokenDecoder], llama: Any) -> None:
    threads = []
    hook = llama.register_forward_pre_hook(lambda *_: threads.append(threading.get_ident()))
    list(decoder()(ask(new=2)))
    hook.remove()
    assert threads == [threading.get_ident()] * 2


def test_errors_reach_the_reader(decoder: Callable[..., TokenDecoder]) -> None:
    ours = decoder()
    with pytest.raises(IndexError):
        list(ours(ask(IDS + 1000)))
    assert len(list(ours(ask(new=3)))) == 3


def test_an_interrupt_in_the_reader_stops(decoder: Callable[..., TokenDecoder], llama: Any) -> None:
    ours, cache = decoder(), DynamicCache(config=llama.config)
    steps: Any = ours(ask(new=100_000, cache=cache))
    next(steps)
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt)
    assert cache.get_seq_length() < 50_000
    assert len(list(ours(ask(new=3)))) == 3


def test_stop_strings_end_the_answer(build: Build) -> None:
    free = build("decode.max_new_tokens=40").generate("def add")
    word = free.text[5:8]
    stopped = build("decode.max_new_tokens=40", f"decode.stop=['{word}']").generate("def add")
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(word)]
    assert len(stopped.token_ids) < 40


def test_it_warns_of_nothing(
    decoder: Callable[..., TokenDecoder], capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(decoder()(ask(new=130)))  # beyond the model's context
        list(decoder(temperature=0.7, top_k=5)(ask(new=3)))
    assert capfd.readouterr() == ("", "")


def test_options_out_of_range_are_refused() -> None:
    assert hints(Generate()) == hints(Generate(temperature=1.0, top_k=1, top_p=1.0)) == []
    assert hints(Generate(max_new_tokens=0)) == ["decode.max_new_tokens=128"]
    assert hints(Generate(temperature=-0.1)) == ["decode.temperature=0.7"]
    assert hints(Generate(temperature=1.0, top_k=0)) == ["decode.top_k=50"]
    for temperature in (1e-300, 1e-4, 101.0, math.inf, math.nan):
        assert hints(Generate(temperature=temperature)) == ["decode.temperature=0.7"]
    for penalty in (math.inf, math.nan, 1e-50, 101.0, -1.0):
        assert hints(Generate(repetition_penalty=penalty)) == ["decode.repetition_penalty=1.0"]
    for seed in (-1, 2**63, 2**64):
        assert hints(Generate(), seed) == ["seed=0"]
    assert hints(Generate(temperature=0.001, repetition_penalty=100.0), 2**63 - 1) == []
    for top_p in (0.0, 1.1, -1.0, math.nan):
        assert hints(Generate(temperature=1.0, top_p=top_p)) == ["decode.top_p=0.9"]
        assert hints(Generate(temperature=1.0, min_p=top_p)) == ["decode.min_p=0.05"]
    assert hints(Generate(repetition_penalty=0.0)) == ["decode.repetition_penalty=1.0"]
    assert hints(Generate(stop=[""])) == ["decode.stop=[]"]
    (hint,) = hints(Generate(stop=["\\n"]))
    assert hint.startswith("let the shell make it: $'decode.stop=")
    assert hints(Generate(stop=["\n"])) == []
    for idle in (Generate(top_k=5), Generate(top_p=0.5), Generate(min_p=0.1)):
        assert hints(idle) == ["decode.temperature=0.7"]


def test_the_receipt_reads_the_settings(build: Build) -> None:
    session = build("decode.temperature=0.5")
    evidence = receipt(session, "decode").evidence
    assert (evidence["sampling"], evidence["temperature"]) == (True, 0.5)
    assert evidence["ids of end tokens"] == "[2]"
    assert not verdict(Generate(temperature=0.0), session)
    assert not verdict(Generate(temperature=0.5), session, end_ids=frozenset({77}))
