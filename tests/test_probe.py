"""A probe that fails: who is told to be at fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.models.llama import modeling_llama

import engine
from engine.errors import PluginError, RuntimeFailure

ModelFolder = Callable[[str], Path]


def _build(model: ModelFolder, *words: str) -> engine.Session:
    given = [f"model.path={model('llama')}", "model.dtype=float32", *words]
    return engine.build(engine.compose("base", given))


def _failing(*_: Any, **__: Any) -> Any:
    raise ValueError("keys of another length")


def test_what_fails_inside_of_the_model_is_told_as_the_combinations(
    model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", _failing)
    with pytest.raises(RuntimeFailure) as refusal:
        _build(model, "cache=static")
    (problem,) = refusal.value.problems
    assert problem.code == "probe-failed"
    assert "this combination fails in modeling_llama.py:" in problem.message
    assert "ValueError: keys of another length" in problem.message
    assert "cache=static" in problem.message
    assert refusal.value.exit_code == 6
    assert "report it" in problem.hint


def test_a_plugin_inside_of_the_model_keeps_its_blame(
    model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.contexts import Attention
    from engine.plugins.attention.sdpa import Sdpa

    def attention(*_: Any) -> Attention:
        return Attention(forward=_failing, mask=lambda **_: None)

    monkeypatch.setattr(Sdpa, "attention", engine.hookimpl(attention))
    with pytest.raises(PluginError, match=r"attention=sdpa .*keys of another length"):
        _build(model, "attention=sdpa")


def test_a_task_that_fails_before_the_model_runs_keeps_its_blame(
    model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.plugins.task import text_generation

    monkeypatch.setattr(text_generation.TextTask, "probe", _failing)
    with pytest.raises(PluginError, match=r"task=text-generation .*keys of another length"):
        _build(model)
