"""Every run is held against its plan, and the score is kept for as long as it can be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import contexts
from engine.planning import scoring
from engine.target import detect
from tests.conftest import Build


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def figures(**changes: float) -> contexts.Figures:
    values = {
        "prompt_tokens": 8, "new_tokens": 8, "forwarded_tokens": 15, "seconds": 0.3,
        "time_to_first_token": 0.1, "tokens_per_second": 50.0, "peak_memory_bytes": 2**29,
    } | changes  # fmt: skip
    return contexts.Figures(**values)  # type: ignore[arg-type]


def test_a_run_is_planned_as_it_was(build: Build) -> None:
    found = scoring.score(build(), figures())
    assert found.measured["peak_memory_bytes"] == 2**29
    planned = found.planned["peak_memory_bytes"]
    assert found.errors["peak_memory_bytes"] == pytest.approx(planned / 2**29 - 1)
    assert set(found.as_dict()) == {"planned", "measured", "errors"}
    assert "peak" in scoring.phrase(found)


def test_the_score_is_kept_and_summed_up(build: Build, home: Path) -> None:
    session = build()
    assert scoring.summary(session.recipe) == {"runs": 0, "same": False}
    for size in (2**29, 2**30, 2**31):
        score = scoring.score(session, figures(peak_memory_bytes=size))
        assert scoring.keep(session, score, figures()) == ""
    lines = (home / "engine" / "scores.jsonl").read_text("utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["recipe"] for entry in entries] == ["base"] * 3
    errors = [abs(entry["errors"]["peak_memory_bytes"]) for entry in entries]
    found = scoring.summary(session.recipe)
    assert found["runs"] == 3
    assert found["peak_memory_bytes"] == sorted(errors)[1]
    assert found["same"]
    # Of other choices, and of none other once there are such runs.
    other = build("attention=eager")
    assert scoring.summary(other.recipe) == found | {"same": False}
    scoring.keep(other, scoring.score(other, figures()), figures())
    assert scoring.summary(other.recipe)["runs"] == 1


@pytest.mark.parametrize("torn", ["", '{"errors": ', "[]", '{"errors": 3}', '{"errors": {}}'])
def test_a_torn_line_spoils_no_score(build: Build, torn: str) -> None:
    session = build()
    scoring.keep(session, scoring.score(session, figures()), figures())
    with scoring.file().open("a", encoding="utf-8") as lines:
        lines.write(f"{torn}\n")
    scoring.keep(session, scoring.score(session, figures()), figures())
    assert scoring.summary(session.recipe)["runs"] == 2


def test_a_score_that_is_no_text_spoils_nothing(build: Build) -> None:
    scoring.file().parent.mkdir(parents=True, exist_ok=True)
    scoring.file().write_bytes(b"\xff\xfe\n")
    assert scoring.summary(build().recipe)["runs"] == 0


def test_an_error_that_is_no_number_does_not_count(build: Build) -> None:
    session = build()
    scoring.keep(session, scoring.score(session, figures()), figures())
    found = scoring.summary(session.recipe)
    (line,) = scoring.file().read_text("utf-8").splitlines()
    entry = json.loads(line)
    entry["errors"] = dict.fromkeys(entry["errors"], "x")
    with scoring.file().open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(entry) + "\n")
    assert scoring.summary(session.recipe) == found | {"runs": 2}


def test_runs_of_another_device_do_not_count(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    session = build()
    scoring.keep(session, scoring.score(session, figures()), figures())
    other = detect()
    other.name = "another"
    monkeypatch.setattr(scoring, "detect", lambda: other)
    assert scoring.summary(session.recipe)["runs"] == 0


def test_a_score_that_cannot_be_kept_breaks_no_run(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_STATE_HOME", str(blocked))
    session = build()
    told = scoring.keep(session, scoring.score(session, figures()), figures())
    assert told.startswith("the score was not kept: ")
    assert scoring.summary(session.recipe) == {"runs": 0, "same": False}
