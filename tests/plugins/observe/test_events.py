"""What an observer is told, and where it keeps what it wants to remember."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from engine import hookimpl, hookspecs
from engine.calls import Chosen
from engine.contexts import Event, Figures, Receipt
from engine.errors import PluginError
from engine.hooks import Hooks
from engine.session import Session
from tests.conftest import Build


@dataclass
class Counter:
    """Count the runs, as the manual shows it, and write down everything."""

    events: ClassVar[list[Event]] = []

    @hookimpl
    def observe(self, event: Event) -> None:
        self.events.append(event)
        if event.kind == "started":
            event.kept["runs"] = event.kept.get("runs", 0) + 1

    @hookimpl
    def receipts(self, session: Any) -> Iterator[Receipt]:
        runs = session.built["observe"].get("runs", 0)
        yield Receipt(slot="observe", claim="runs are counted", evidence={"runs": runs}, ok=True)


@pytest.fixture
def counted(build: Build) -> Session:
    """Return a session on which a counter looks on."""
    Counter.events.clear()
    return watched(build("decode.max_new_tokens=2"))


def watched(session: Session) -> Session:
    session.hooks = Hooks([*session.hooks.chosen, Chosen("observe", "counter", Counter())])
    return session


def runs(session: Session) -> Any:
    (found,) = [each for each in session.collect_receipts() if each.slot == "observe"]
    return found.evidence["runs"]


def test_an_observer_keeps_what_it_wants_in_the_session(counted: Session, build: Build) -> None:
    assert runs(counted) == 0, "receipts can look before the first event"
    counted.generate("def add")
    counted.generate(["def add", "x"])
    assert runs(counted) == 2
    other = watched(build("decode.max_new_tokens=2"))
    other.generate("def add")
    assert (runs(other), runs(counted)) == (1, 2), "each session has its own"
    assert vars(Counter()) == {}


def test_the_manual_names_what_each_event_has(counted: Session, build: Build) -> None:
    counted.generate("def add")
    counted.generate(["def add", "x"])
    stream = counted.stream("def add")
    counted.built["decode"] = None
    with pytest.raises(PluginError):
        next(stream)
    found = [(event.kind, set(event.data)) for event in Counter.events]
    figures = set(Figures.__dataclass_fields__)
    assert found == [
        ("started", {"prompt_tokens"}),
        ("finished", {"finish_reason", *figures}),
        ("started", {"prompt_tokens"}),
        ("finished", {"sequences"}),
        ("started", {"prompt_tokens"}),
        ("failed", {"error"}),
    ]
    manual = hookspecs.observe.__doc__ or ""
    named = {key for kind, keys in found for key in (kind, *keys - figures)}
    assert [key for key in {*named, "built", "recipe", "digest"} if f"`{key}`" not in manual] == []
