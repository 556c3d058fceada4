"""observe=trace writes down every hook call, and never takes a run down."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import calls
from engine.contexts import Event
from engine.errors import CheckpointError, EngineError
from engine.plugins.observe.trace import Trace
from tests.conftest import Build
from tests.plugins.helpers import hints, receipt, refusals, verdict


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_hook_and_event_has_a_line(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    session = build("observe=trace", f"observe.path={path}", "decode.max_new_tokens=4")
    session.generate("def add")
    found = lines(path)
    assert {line["hook"] for line in found if "hook" in line} >= {
        *calls.PROVIDERS,
        *calls.COLLECTING,
    } - {"configure", "prepare", "reshape"}  # that nobody answers
    events = [line["event"] for line in found if "event" in line]
    assert events == ["built", "started", "finished"]
    session.hooks.observe(Event(kind="failed", data={"error": "none at all"}))
    assert lines(path)[-2]["error"] == "none at all"
    assert next(line for line in found if line.get("event") == "finished")["new_tokens"] == 4
    assert all(line["seconds"] >= 0 for line in found if "hook" in line)
    assert all(line["time"] > 1.7e9 for line in found)
    evidence = receipt(session, "observe").evidence
    assert evidence["path"] == str(path)
    assert 0 < int(evidence["lines"]) <= len(found)


def test_a_failing_hook_is_written_down_and_still_fails(
    build: Build, model: Callable[[str], Path], tmp_path: Path
) -> None:
    path, folder = tmp_path / "trace.jsonl", tmp_path / "diverged"
    shutil.copytree(model("llama"), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\xff" * 8)  # NaN
    with pytest.raises(CheckpointError):
        build("observe=trace", f"observe.path={path}", f"model.path={folder}")
    (line,) = [line for line in lines(path) if "error" in line]
    assert line["hook"] == "load"
    assert line["error"].startswith("CheckpointError: ")


def test_paths_that_cannot_be_written_are_refused(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hints(Trace(path=str(tmp_path / "new.jsonl"))) == []
    assert "is a folder" in refusals(Trace(path=str(tmp_path)))[0].message
    assert "there is no folder" in refusals(Trace(path=str(tmp_path / "a" / "b")))[0].message
    with pytest.raises(EngineError, match="there is no folder"):
        build("observe=trace", f"observe.path={tmp_path}/a/b")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "permission denied" in refusals(Trace(path=str(tmp_path / "new.jsonl")))[0].message
    assert not list(tmp_path.iterdir())


def test_lines_of_other_runs_are_no_proof(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    trace = Trace(path=str(file))
    assert verdict(trace, None)
    trace.append = lambda entry: None
    assert file.read_text(encoding="utf-8")
    assert not verdict(trace, None)


def test_a_line_that_cannot_be_written_is_said_to_be_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = Trace(path=str(tmp_path))
    trace.append({"hook": "load"})
    assert "observe=trace lost a line" in capsys.readouterr().err
    assert not verdict(trace, None)
