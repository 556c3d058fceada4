"""What tests share: tiny models made once, and the command as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from engine import builder, recipe
from engine.quantizing import remembered, trial
from engine.session import Session
from tests.hub import Hub, served
from tests.models import tiny_model
from tests.trials import filling

Run = Callable[..., subprocess.CompletedProcess[str]]
Build = Callable[..., Session]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, so that plain `pytest` works everywhere."""
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and there is none")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep scores and measurements of this machine away from the user's own.

    Trials of packed layers are shared by all processes that run tests.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        patch.setenv("XDG_CACHE_HOME", str(cache))
        remembered.file().parent.mkdir()
        remembered.file().symlink_to(shared / "trials.jsonl")
        patch.setattr(trial, "_attempt", filling(trial._attempt, shared))
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny random model of a family, made once."""
    made: dict[str, Path] = {}

    def folder(family: str = "llama") -> Path:
        if family not in made:
            made[family] = tiny_model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


@pytest.fixture
def build(model: Callable[[str], Path]) -> Iterator[Build]:
    """Return a function that builds the base recipe on a tiny model; sessions are closed after."""
    sessions: list[Session] = []

    def make(*overrides: str, family: str = "llama", name: str = "base") -> Session:
        words = [f"model.path={model(family)}", "model.dtype=float32", *overrides]
        session = builder.build(recipe.compose(name, words))
        sessions.append(session)
        return session

    yield make
    for session in sessions:
        session.close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Return a hub of one model, `org/model`, without files yet."""
    with served(monkeypatch, tmp_path) as server:
        yield server


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that runs the `engine` command in an empty folder."""
    command = Path(sys.executable).with_name("engine")
    empty = tmp_path_factory.mktemp("elsewhere")

    def run(
        *arguments: str, text: str = "", env: dict[str, str] | None = None, cwd: Path = empty
    ) -> subprocess.CompletedProcess[str]:
        words: Sequence[str] = [str(command), *arguments]
        return subprocess.run(
            words,
            input=text,
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
            timeout=300,
            check=False,
        )

    return run
