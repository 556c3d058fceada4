"""One text is one prompt, whichever way it comes in."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.cli import common, streams
from engine.errors import RecipeError

WRITTEN = ["{}", "\ufeff{}", "{}\n", "{}\r\n", "\ufeff{}\r\n", "{}\r"]


def ways(text: str, folder: Path) -> list[str]:
    """Return what a text becomes as an argument, from a file, and from standard input."""
    file = folder / "prompt.txt"
    file.write_bytes(text.encode())
    found = [common.read_prompt(text), common.read_prompt(f"@{file}")]
    with pytest.MonkeyPatch.context() as patch:
        for given_as in (None, "-"):
            stdin = SimpleNamespace(buffer=io.BytesIO(text.encode()), isatty=lambda: False)
            patch.setattr(sys, "stdin", stdin)
            found.append(common.read_prompt(given_as))
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet="a \r\n\t\u20ac", max_size=8), st.sampled_from(WRITTEN))
def test_a_text_is_one_prompt(tmp_path: Path, text: str, written: str) -> None:
    found = ways(written.format("x" + text), tmp_path)
    assert len(set(found)) == 1
    assert "\r" not in found[0]
    assert found[0].startswith("x")


def test_lines_are_those_of_unix_and_the_last_break_is_the_files(tmp_path: Path) -> None:
    for written in WRITTEN:
        assert ways(written.format("a\r\n\r\nb"), tmp_path) == ["a\n\nb"] * 4
    assert ways("a\n\n", tmp_path) == ["a\n"] * 4


def test_a_mark_inside_of_a_text_is_text(tmp_path: Path) -> None:
    assert ways("a\ufeffb", tmp_path) == ["a\ufeffb"] * 4


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "latin-1"])
def test_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("\u00e9\u00e8".encode(encoding))
    with pytest.raises(RecipeError, match="is not UTF-8 text") as refusal:
        common.read_prompt(f"@{file}")
    assert ("iconv -f utf-16 -t" in str(refusal.value)) == (encoding == "utf-16")


def test_a_conversation_begins_without_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfhello\r\nthere\r\n"), encoding="utf-8")
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, typed if name == "stdin" else getattr(sys, name))
    monkeypatch.setattr(streams, "_output", lambda stream: stream)
    streams.prepare()
    assert [line.rstrip("\n") for line in sys.stdin] == ["hello", "there"]
