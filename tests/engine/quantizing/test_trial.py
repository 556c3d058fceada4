"""What is wrong with packed layers on this CPU is found by trying, once, and remembered."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.quantizing import remembered, trial
from engine.quantizing.trial import Case, faults
from tests import faulty_layers

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remember nothing, try only what is asked, and find the layers of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    attempt: Any = trial._attempt
    monkeypatch.setattr(trial, "_attempt", attempt.unfilled)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[list[Case]]:
    """Have every layer be right without trying, and return what was to be tried each time."""
    found: list[list[Case]] = []

    def attempt(cases: Sequence[Case]) -> tuple[dict[Case, str], Sequence[Case]]:
        found.append(list(cases))
        return dict.fromkeys(cases, ""), ()

    monkeypatch.setattr(trial, "_attempt", attempt)
    return found


def case(make: Callable[..., Any], size: tuple[int, int] = (24, 40), **options: Any) -> Case:
    (found,) = trial.cases({"layer": size}, "float32", make, "torch", **options).values()
    return found


RIGHT = case(faulty_layers.right)


def test_faults_of_every_kind_are_found_and_none_hides_another() -> None:
    wrong, ends, reads_on = faulty_layers.wrong, faulty_layers.ends, faulty_layers.reads_on
    expected = {
        RIGHT: "",
        case(wrong, rows=1): "the product of 1 row of inputs is off by",
        case(ends, by="SIGSEGV"): "the product of 1 row of inputs ends the process (SIGSEGV)",
        case(wrong, rows=3): "the product of 3 rows of inputs is off by",
        case(ends, by="SIGILL", rows=17): "product of 17 rows of inputs ends the process (SIGILL)",
        case(wrong, rows=129): "the product of 129 rows of inputs is off by",
        case(faulty_layers.neighbour): "the product of 1 row of inputs is off by",
        case(faulty_layers.raises): "1 row of inputs raises NotImplementedError: not for this CPU",
        case(faulty_layers.right, (1, 1)): "",
        case(faulty_layers.right, (300, 7)): "",
    }
    if os.name == "posix":  # where memory can be protected
        expected |= {
            case(reads_on, operand="inputs", beyond=1): "1 row of inputs ends the process (SIG",
            case(reads_on, operand="weight", beyond=1): "1 row of inputs ends the process (SIG",
            case(reads_on, operand="inputs", beyond=0): "",
            case(reads_on, operand="weight", beyond=0): "",
            case(faulty_layers.adds_what_follows): "is off by nan",
        }
    if sys.platform == "linux":  # where glibc fills what it gives out
        expected[case(faulty_layers.forgets_to_write)] = "is off by"
    found = faults(expected)
    assert found.keys() == expected.keys()
    for each, says in expected.items():
        assert (says in found[each]) if says else not found[each], (each, found[each])
        assert "\n" not in found[each]


def test_a_verdict_is_remembered(attempts: list[list[Case]]) -> None:
    asked = [RIGHT, case(faulty_layers.wrong, rows=2)]
    remembered.add({asked[1]: "is wrong"})
    assert faults(asked) == {RIGHT: "", asked[1]: "is wrong"}
    assert faults(reversed(asked)) == {RIGHT: "", asked[1]: "is wrong"}
    assert attempts == [[RIGHT]]
    other = case(faulty_layers.right, (8, 8))
    assert faults([*asked, other])[other] == ""
    assert attempts == [[RIGHT], [other]]
    tried = [json.loads(line) for line in remembered.file().read_text().splitlines() if line]
    assert [each["case"]["outputs"] for each in tried] == [24, 24, 8]


def test_of_another_cpu_or_library_it_is_tried_again(
    attempts: list[list[Case]], monkeypatch: pytest.MonkeyPatch
) -> None:
    faults([RIGHT])
    with monkeypatch.context() as patch:
        patch.setattr(remembered, "_cpu_lines", lambda: {"model name": "x", "flags": "sse"})
        faults([RIGHT])
        assert remembered.cpu() == "x"
    assert len(attempts) == 2
    with monkeypatch.context() as patch:
        patch.setattr(remembered, "version", lambda name: "0.1" if name == "torch" else "2")
        faults([RIGHT])
    assert len(attempts) == 3
    with monkeypatch.context() as patch:
        patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        faults([RIGHT])
    assert len(attempts) == 4
    faults([replace(RIGHT, library="pluggy")])
    faults([replace(RIGHT, dtype="bfloat16")])
    assert len(attempts) == 6
    faults([RIGHT])
    assert len(attempts) == 6


def test_it_is_this_cpu_that_is_told() -> None:
    lines = remembered._cpu_lines()
    assert remembered.cpu()
    if sys.platform == "linux":
        assert len(lines) > 1, "nothing would tell one CPU from another"
        assert lines.get("flags") or lines.get("Features") or lines.get("isa")


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe\x00{", b'{"key": 1}\n[]\nnull\n{"fault": ""}', b'{"key": "', b"[" * 99_999],
)
def test_a_damaged_file_is_ignored_and_added_to(attempts: list[list[Case]], content: bytes) -> None:
    place = remembered.file()
    place.parent.mkdir()
    place.write_bytes(content)
    assert faults([RIGHT]) == faults([RIGHT]) == {RIGHT: ""}
    assert len(attempts) == 1
    assert place.read_bytes().startswith(content)


def test_a_verdict_that_is_no_text_is_none(attempts: list[list[Case]]) -> None:
    faults([RIGHT])
    place = remembered.file()
    line = json.loads(place.read_text())
    place.write_text(json.dumps({**line, "fault": None}))
    assert faults([RIGHT]) == {RIGHT: ""}
    assert len(attempts) == 2


def test_what_cannot_be_written_is_tried_each_time(attempts: list[list[Case]]) -> None:
    remembered.file().mkdir(parents=True)
    assert faults([RIGHT]) == faults([RIGHT]) == {RIGHT: ""}
    assert len(attempts) == 2


def _write(number: int) -> None:
    sizes = {f"{inputs}": (number, inputs) for inputs in range(1, 101)}
    for each in trial.cases(sizes, "float32", faulty_layers.right, "torch").values():
        remembered.add({each: f"{number}"})


def test_two_can_write_at_once() -> None:
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(_write, (1, 2)))
    sizes = {f"{o} {i}": (o, i) for o in (1, 2) for i in range(1, 101)}
    asked = trial.cases(sizes, "float32", faulty_layers.right, "torch").values()
    assert remembered.read(asked) == {each: f"{each.outputs}" for each in asked}


def test_a_file_that_has_grown_large_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    _write(1)
    before = remembered.file().stat().st_size
    monkeypatch.setattr(remembered, "LARGEST", before - 1)
    remembered.add({RIGHT: ""})
    assert remembered.file().stat().st_size < before / 50
    assert remembered.read([RIGHT]) == {RIGHT: ""}


def test_what_says_nothing_of_the_cpu_is_no_fault_and_not_remembered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And nothing is found in the current folder, where a model may have anything."""
    (tmp_path / "torch.py").write_text("raise SystemExit('not by us')")
    monkeypatch.chdir(tmp_path)
    lacking = [
        case(faulty_layers.needs_another_library),
        case(faulty_layers.lacks_memory),
        case(faulty_layers.ends, by="SIGKILL"),
    ]
    assert faults([*lacking, RIGHT]) == {RIGHT: ""}
    assert remembered.read(lacking) == {}


@pytest.mark.parametrize("command", ["/nowhere/python", "/bin/false", "/bin/echo"])
def test_where_no_process_starts_nothing_is_known(
    monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    remembered.add({RIGHT: ""})
    monkeypatch.setattr(sys, "executable", command)
    assert faults([RIGHT, case(faulty_layers.right, (9, 9))]) == {RIGHT: ""}


def test_one_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PATIENCE", 0.01)
    assert faults([RIGHT]) == {}


def test_none_is_started_while_they_are_paused(attempts: list[list[Case]]) -> None:
    other = case(faulty_layers.right, (9, 9))
    faults([RIGHT])
    with trial.paused():
        assert faults([RIGHT, other]) == {RIGHT: ""}
    assert attempts == [[RIGHT]]
    assert faults([other]) == {other: ""}
    assert faults([]) == {}
    assert attempts == [[RIGHT], [other]]


@pytest.mark.parametrize(
    ("size", "tried"),
    [
        ((4096, 4096), 4096),
        ((14336, 4096), 4096),
        ((4096, 14336), 1024),
        ((14347, 4096), 4096 + 11),
        ((5000, 14336), 1024 + 5000 % 1024),
        ((1500, 14336), 1500),
        ((1, 2**26), 1),
        ((7, 4096), 7),
    ],
)
def test_of_large_layers_some_outputs_are_left_out(size: tuple[int, int], tried: int) -> None:
    one = case(faulty_layers.right, size)
    assert one.tried == replace(one, outputs=tried)
    assert one.tried.tried == one.tried
    assert one.tried.outputs % trial.PERIOD == one.outputs % trial.PERIOD


def test_a_large_layer_stands_for_those_like_it(attempts: list[list[Case]]) -> None:
    first, second = (case(faulty_layers.right, (each, 16384)) for each in (2048, 4096))
    remembered.add({first.tried: "is wrong"})
    assert faults([first, second]) == {first: "is wrong", second: "is wrong"}
    assert not attempts
