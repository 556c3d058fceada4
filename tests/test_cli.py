"""The command as a user runs it."""

from __future__ import annotations

import inspect
import io
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

from engine.cli import chat, check, run, show
from engine.generate import TextStream
from tests.conftest import Run

ModelFolder = Callable[[str], Path]
COMMAND = Path(sys.executable).with_name("engine")
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
    file.write_bytes(b"\xef\xbb\xbfdef add\r\n")
    words = ["base", f"model.path={model('llama')}", "decode.max_new_tokens=5", "--json"]
    by_text = _json(engine("run", *words, "-p", "def add"))["token_ids"]
    assert _json(engine("run", *words, "-p", f"@{file}"))["token_ids"] == by_text
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
    keys = {"slot", "code", "message", "hint", "where", "source"}
    assert set(found["problems"][0]) == keys
    assert {problem["slot"] for problem in found["problems"]} >= {"attention", "cache"}


def test_check_refuses_what_does_not_fit(engine: Run, model: ModelFolder) -> None:
    done = engine("check", "base", f"model.path={model('llama')}", "target.usable_gib=0.0001")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "GiB usable" in done.stderr
    assert "`engine plan`" in done.stderr


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


def _examples(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("    engine ", "    printf "))]


def test_an_example_is_one_line_that_can_be_pasted(engine: Run) -> None:
    pages = {verb: engine(verb, "--help").stdout for verb in ("run", "chat", "check", "show")}
    docs = {"run": run.run, "chat": chat.chat, "check": check.check, "show": show.show}
    for verb, page in pages.items():
        for line in _examples(inspect.getdoc(docs[verb]) or ""):
            assert line.strip() in page
    whole = '    engine run tiny quantize=bitsandbytes quantize.bits=8 -p "def add(a, b):"'
    assert whole in engine("--help").stdout.splitlines()


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


def _shell(line: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line.replace("engine ", f"'{COMMAND}' ")],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=cwd, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **env}, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("engine run tiny -p x >&-", 6, "standard output is closed"),
        ("engine list >&-", 6, "standard output is closed"),
        ("engine run tiny -p - <&-", 2, "standard input is closed"),
        ("engine run tiny <&-", 2, "standard input is closed"),
        ("engine chat tiny <&-", 2, "standard input is closed"),
        ("engine check nope 2>&-", 2, ""),
        ("engine check nope 2>/dev/full", 2, ""),
        ("engine check tiny 2>&-", 0, ""),
        ("engine show tiny --json >/dev/full", 6, "cannot be written: No space left"),
        ("engine run tiny decode.max_new_tokens=2 -p x >/dev/full", 6, "cannot be written"),
        ("engine list | true", 0, ""),
        ("engine run tiny -p $'\\xff\\xfe'", 2, "-p TEXT is not UTF-8"),
        ("printf '\\xff' | engine run tiny -p -", 2, "standard input is not UTF-8"),
        ("printf '\\xff' | engine chat tiny", 2, "standard input is not UTF-8"),
        ('cd "$(mktemp -d)" && rmdir "$PWD" && engine list', 2, "current folder does not exist"),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_streams_and_folders_that_are_not_there(
    line: str, code: int, says: str, unbuffered: str, tmp_path: Path
) -> None:
    done = _shell(line, tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert says in done.stderr
    assert bool(says) == bool(done.stderr)


ASCII = {"PYTHONIOENCODING": "ascii"}
C_LOCALE = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


@pytest.mark.parametrize("env", [ASCII, C_LOCALE])
def test_output_that_holds_ascii_only(engine: Run, tmp_path: Path, env: dict[str, str]) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "étude.yaml").write_text("# Übung\n", encoding="utf-8")
    for words in (["list", "recipes"], ["list", "recipes", "--json"]):
        done = engine(*words, env={**env, "PYTHONUNBUFFERED": ""}, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii()
    assert any(row["about"] == "Übung" for row in json.loads(done.stdout))


def test_a_prompt_arrives_whole_in_any_locale(engine: Run, model: ModelFolder) -> None:
    words = ["run", "base", f"model.path={model('llama')}", "decode.max_new_tokens=2", "--json"]
    usual = _json(engine(*words, "-p", "é ü"))
    assert (
        _json(engine(*words, "-p", "é ü", env=C_LOCALE))["figures"]["prompt_tokens"]
        == (usual["figures"]["prompt_tokens"])
    )


@pytest.mark.parametrize("words", [["--quantize", "nf4"], ["--quantize=nf4"]])
def test_a_value_typed_as_an_option_is_told_how_it_is_typed(engine: Run, words: list[str]) -> None:
    done = engine("run", "tiny", *words)
    assert done.returncode == 2
    assert "no option --quantize" in done.stderr
    assert "\n  quantize=nf4\n" in done.stderr


@pytest.mark.parametrize("missing", ["hydra", "transformers", "huggingface_hub"])
def test_a_package_that_is_missing_is_named(engine: Run, tmp_path: Path, missing: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{missing!r}] = None")
    words = ("check", "base", "model.path=some/model") if missing != "transformers" else ("run",)
    done = engine(*words, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1, done.stdout
    assert f"{missing}" in done.stderr
    assert "is not installed: pip install recipe-engine brings it" in done.stderr
    assert "Traceback" not in done.stderr
    debug = engine(*words, env={"PYTHONPATH": str(tmp_path), "ENGINE_DEBUG": "1"})
    assert "Traceback" in debug.stderr


PLUGIN = """
import dataclasses
import engine

@dataclasses.dataclass
class Quitter:
    def __post_init__(self):
        raise SystemExit(0)
"""


def test_a_plugin_cannot_end_the_program(engine: Run, tmp_path: Path) -> None:
    (tmp_path / "quitting.py").write_text(PLUGIN)
    about = tmp_path / "quitting-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: quitting\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[engine.observe]\nslow = quitting:Quitter\n")
    words = ["base", "model.path=some/model", "observe=slow"]
    done = engine("check", *words, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 5, done.stdout
    assert "observe: making it raised SystemExit: 0" in done.stderr
    assert "Traceback" not in done.stderr


class _LeftReader(io.StringIO):
    def write(self, text: str, /) -> int:
        if text:
            raise BrokenPipeError
        return 0


@pytest.mark.parametrize("verb", ["run", "chat"])
def test_a_reader_that_leaves_stops_the_answer(
    model: ModelFolder, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    closed: list[TextStream] = []
    monkeypatch.setattr(TextStream, "close", lambda stream: closed.append(stream))
    monkeypatch.setattr(sys, "stdin", io.StringIO("def add\n"))
    monkeypatch.setattr(sys, "stdout", _LeftReader())
    words = ["base", f"model.path={model('llama')}"]
    with pytest.raises(BrokenPipeError):
        run.run(words, prompt="def add") if verb == "run" else chat.chat(words)
    assert len(closed) == 1


def test_a_reader_that_leaves_early_gets_no_traceback(model: ModelFolder) -> None:
    words = f"'{COMMAND}' run base model.path='{model('llama')}' -p x -q decode.max_new_tokens=100"
    done = subprocess.run(
        f"{words} | head -c 1", shell=True, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.stderr == ""


def _started(model: ModelFolder, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [COMMAND, *words, f"model.path={model('llama')}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_an_interrupt_exits_130(model: ModelFolder) -> None:
    process = _started(model, "chat", "base")
    time.sleep(1)  # importing torch takes longer than this
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_more_interrupts_during_an_answer_exit_130_quietly(model: ModelFolder) -> None:
    process = _started(model, "run", "base", "-p", "x", "-q", "decode.max_new_tokens=120")
    assert process.stdout is not None
    process.stdout.read(1)
    for _ in range(20):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    # An interrupt that falls into a destructor is Python's to report.
    assert not errors or errors.startswith("Exception ignored in")


def test_a_chat_on_a_terminal() -> None:
    """Type into a real pseudo-terminal: a question, a command, the end of file."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [COMMAND, "chat", "decode.max_new_tokens=8"],
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
