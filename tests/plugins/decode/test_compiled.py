"""decode=compiled gives the tokens of decode=generate, from steps that torch has compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from engine.plugins.decode import compiled
from tests.conftest import Build
from tests.plugins.helpers import receipt

WORDS = ("cache=static", "decode.max_new_tokens=20")
PROMPTS = ["def add", "a prompt that is longer than a window of sixteen tokens"]


@pytest.mark.slow  # the compiler takes half a minute for a model of two layers
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_steps_are_compiled_and_tokens_equal(build: Build, family: str) -> None:
    plain = build(*WORDS, family=family)
    session = build("decode=compiled", *WORDS, family=family)
    for prompt in PROMPTS:
        assert session.generate(prompt).token_ids == plain.generate(prompt).token_ids
    together = [output.token_ids for output in session.generate(PROMPTS)]
    assert together == [output.token_ids for output in plain.generate(PROMPTS)]
    session.collect_receipts()
    evidence = receipt(session, "decode").evidence
    assert evidence["graph breaks"] == 0
    # Another length, another batch, and with a window once more for when it is full.
    assert 1 <= int(evidence["graphs"]) <= 6
    assert int(evidence["compiled steps"]) > 57
    graphs = evidence["graphs"]
    session.generate(PROMPTS[0])
    session.collect_receipts()
    assert receipt(session, "decode").evidence["graphs"] == graphs


@pytest.mark.gpu
def test_cuda_graphs_replay_the_step(build: Build) -> None:
    plain, session = build(*WORDS), build("decode=compiled", *WORDS)
    assert session.device.type == "cuda"
    for prompt in PROMPTS:
        assert session.generate(prompt).token_ids == plain.generate(prompt).token_ids
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_a_step_that_is_not_compiled_is_not_reported_as_one(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.raises(engine.errors.PluginError, match="steps of one token are compiled"):
        build("decode=compiled", *WORDS)


def test_each_session_compiles_its_own_steps(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_: Any = torch.compile
    # Traced and not compiled: that is what sessions could share, and it takes a second.
    monkeypatch.setattr(
        torch, "compile", lambda function, **given: compile_(function, backend="eager", **given)
    )
    words = ("decode=compiled", "cache=static", "decode.max_new_tokens=4")
    first = build(*words)
    second = build(*words)
    for session in (first, second):
        assert int(receipt(session, "decode").evidence["graphs"]) > 0


def codes(*words: str, model: Path) -> list[str]:
    recipe = engine.compose("base", [f"model.path={model}", "decode=compiled", *words])
    return [problem.code for problem in engine.check(recipe).problems]


def test_refusals(model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    llama = model("llama")
    assert codes("cache=static", model=llama) == []
    assert codes("cache=dynamic", model=llama) == ["compiled-growing-cache"]
    monkeypatch.setattr(compiled, "which", lambda name: None)
    assert codes("cache=static", "target=cpu", model=llama) == ["no-compiler"]
