"""The command as a user runs it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run

ModelFolder = Callable[[str], Path]
GUIDE = (
    "Question: Please write a function in Python that transforms bytes to Giga bytes.\n\nAnswer:"
)


def _json(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_run_without_arguments_completes_with_the_embedded_model(engine: Run) -> None:
    done = engine("run")
    assert done.returncode == 0, done.stderr
    assert "def " in done.stdout
    assert "tokens/s" in done.stderr
    assert "first token" in done.stderr
    for slot in ("load", "quantize", "heads", "position_encoding", "attention", "cache"):
        assert f"ok  {slot}=" in done.stderr


def test_the_four_bit_recipe_proves_each_choice(engine: Run) -> None:
    found = _json(engine("run", "tiny-4bit-gqa", "-p", GUIDE, "--json"))
    assert set(found) >= {"text", "token_ids", "figures", "receipts", "finish_reason"}
    receipts = {receipt["slot"]: receipt for receipt in found["receipts"]}
    assert all(set(r) == {"slot", "plugin", "claim", "evidence", "ok"} for r in receipts.values())
    assert all(receipt["ok"] for receipt in receipts.values())
    packed = receipts["quantize"]["evidence"]
    assert packed["bytes after"] < packed["bytes before"] / 3
    assert receipts["heads"]["evidence"]["kind"] == "GQA"
    assert receipts["attention"]["evidence"]["calls"] > 0
    assert found["figures"]["new_tokens"] == len(found["token_ids"]) > 0


def test_json_is_one_object_on_standard_output(engine: Run, model: ModelFolder) -> None:
    words = ["base", f"model.path={model('llama')}", "decode.max_new_tokens=5"]
    found = _json(engine("run", *words, "-p", "def add", "--json"))
    assert found["figures"]["prompt_tokens"] > 0
    assert found["figures"]["forwarded_tokens"] == found["figures"]["prompt_tokens"] + 4


def test_prompts_come_from_text_file_and_standard_input(
    engine: Run, model: ModelFolder, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("def add", encoding="utf-8")
    words = ["base", f"model.path={model('llama')}", "decode.max_new_tokens=5", "--json"]
    by_text = _json(engine("run", *words, "-p", "def add"))["token_ids"]
    (tmp_path / "line.txt").write_text("def add\n", encoding="utf-8")
    assert _json(engine("run", *words, "-p", f"@{tmp_path}/line.txt"))["token_ids"] == by_text
    assert _json(engine("run", *words, "-p", f"@{file}"))["token_ids"] == by_text
    assert _json(engine("run", *words, "-p", "-", text="def add"))["token_ids"] == by_text
    assert _json(engine("run", *words, text="def add"))["token_ids"] == by_text


def test_quiet_prints_the_answer_only(engine: Run, model: ModelFolder) -> None:
    done = engine(
        "run", "base", f"model.path={model('llama')}", "-p", "def add", "-q",
        "decode.max_new_tokens=5",
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == ""


def test_chat_answers_each_line_and_reuses_the_cache(engine: Run) -> None:
    questions = (
        "Please write a function in Python that transforms bytes to Giga bytes.\n"
        "How can I modify the function above to return Mega bytes instead?\n"
    )
    done = engine("chat", "tiny", "--json", text=questions)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert "def " in first["text"]
    proof = second["receipts"][-1]
    assert proof["claim"] == "this turn processed only what was new"
    assert proof["ok"]
    cached = proof["evidence"]["from_cache"]
    assert cached == first["figures"]["prompt_tokens"] + first["figures"]["new_tokens"] - 1
    assert second["figures"]["forwarded_tokens"] < second["figures"]["prompt_tokens"]


def test_what_show_prints_is_the_same_recipe_again(engine: Run, tmp_path: Path) -> None:
    words = ["cache=static", "cache.max_tokens=99", "quantize=nf4", "observe=trace", "target=l4"]
    shown = engine("show", "tiny", *words)
    assert shown.returncode == 0, shown.stderr
    file = tmp_path / "again.yaml"
    file.write_text(shown.stdout, encoding="utf-8")
    first = _json(engine("show", "tiny", *words, "--json"))
    second = _json(engine("show", str(file), "--json"))
    assert second["recipe"] == first["recipe"]
    assert second["choices"] == first["choices"]
    assert second["digest"] == first["digest"]


def test_check_says_when_it_could_not_look(engine: Run) -> None:
    done = engine("check", "base", "model.path=some-org/some-model")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok so far")
    assert "NOT checked" in done.stdout


def test_check_says_ok_or_everything_that_is_wrong(engine: Run) -> None:
    assert engine("check", "tiny").returncode == 0
    assert _json(engine("check", "tiny-4bit-gqa", "--json"))["ok"] is True
    done = engine("check", "tiny", "attention=sdpaa", "cache.size=3", "decode.top_p=7", "--json")
    assert done.returncode == 2
    found = json.loads(done.stdout)
    assert found["ok"] is False
    assert {"slot", "code", "message", "hint", "where"} == set(found["problems"][0])
    assert {problem["slot"] for problem in found["problems"]} >= {"attention", "cache"}


def test_check_refuses_what_does_not_fit(engine: Run, model: ModelFolder) -> None:
    done = engine("check", "base", f"model.path={model('llama')}", "target.usable_gib=0.0001")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "GiB usable" in done.stderr
    assert "quantize=" in done.stderr


def test_list_names_choices_and_where_they_come_from(engine: Run) -> None:
    rows = _json(engine("list", "--json"))
    assert {"group": "attention", "name": "sdpa"}.items() <= next(
        row for row in rows if row["name"] == "sdpa"
    ).items()
    sdpa = next(row for row in rows if row["name"] == "sdpa")
    assert sdpa["origin"].startswith("recipe-engine ")
    assert {row["group"] for row in rows} >= {"recipes", "load", "cache", "target"}
    assert engine("list", "attentoin").returncode == 2
    assert "did you mean attention" in engine("list", "attentoin").stderr


def test_list_verify_imports_everything(engine: Run) -> None:
    rows = _json(engine("list", "--verify", "--json"))
    plugins = [row for row in rows if row["kind"] == "plugin"]
    assert plugins
    assert all(row["ok"] and row["about"] for row in plugins)


@pytest.mark.parametrize("verb", ["run", "chat", "check", "show", "list"])
def test_help_teaches_with_an_example(engine: Run, verb: str) -> None:
    done = engine(verb, "--help")
    assert done.returncode == 0
    assert f"engine {verb}" in done.stdout


def test_version(engine: Run) -> None:
    from engine import __version__

    assert engine("--version").stdout.strip() == __version__


def test_usage_errors_exit_2(engine: Run) -> None:
    done = engine("run", "--no-such-option")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nope"], 2, "no recipe called 'nope'"),
        (["base", "model.path=./not-here", "-p", "x"], 3, "not-here"),
        (["tiny", "target.usable_gib=0.001"], 4, "GiB usable"),
        (["tiny", "-p", "x " * 2000], 6, "positions"),
        (["tiny", "-p", "@/no/such/file"], 2, "cannot read"),
    ],
)
def test_exit_codes(engine: Run, arguments: list[str], code: int, says: str) -> None:
    done = engine("run", *arguments)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(engine: Run) -> None:
    assert "Traceback" in engine("run", "nope", env={"ENGINE_DEBUG": "1"}).stderr


def test_a_reader_that_leaves_early_gets_no_traceback(model: ModelFolder) -> None:
    command = Path(sys.executable).with_name("engine")
    words = f"'{command}' run base model.path='{model('llama')}' -p x -q decode.max_new_tokens=100"
    done = subprocess.run(
        f"{words} | head -c 1", shell=True, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.stderr == ""


def test_an_interrupt_exits_130(model: ModelFolder) -> None:
    command = Path(sys.executable).with_name("engine")
    process = subprocess.Popen(
        [command, "chat", "base", f"model.path={model('llama')}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(1)  # importing torch takes longer than this
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_a_chat_on_a_terminal() -> None:
    """Type into a real pseudo-terminal: a question, a command, the end of file."""
    command = Path(sys.executable).with_name("engine")
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [command, "chat", "decode.max_new_tokens=8"],
        stdin=child, stdout=child, stderr=child, start_new_session=True,
        env={**os.environ, "TERM": "xterm", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    os.close(child)
    shown = ""
    for typed in ("What is this?\n", "/reset\n", "\x04"):
        shown += _until(parent, "> ")
        os.write(parent, typed.encode())
    assert process.wait(timeout=60) == 0
    assert "/exit" in shown
    assert "tokens/s" in shown
    os.close(parent)


def _until(terminal: int, prompt: str) -> str:
    text = ""
    deadline = time.monotonic() + 60
    while not text.endswith(prompt):
        assert time.monotonic() < deadline, text
        text += os.read(terminal, 1024).decode(errors="replace")
    return text
