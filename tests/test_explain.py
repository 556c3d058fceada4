"""`engine explain`, as a user runs it and as a function."""

from __future__ import annotations

import inspect
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

import engine
from engine import explaining, registry
from engine.rules import Rule
from engine.verdict import check
from tests.conftest import Run
from tests.plugins.helpers import priced

ModelFolder = Callable[[str], Path]
COMMAND = Path(sys.executable).with_name("engine")


def _explained(*words: str) -> dict[str, explaining.Part]:
    found = explaining.explain(engine.compose(words[0], words[1:]))
    return {part.slot: part for part in found.parts}


def test_it_says_what_each_choice_does_costs_and_where_that_is_written(engine: Run) -> None:
    done = engine("explain", "tiny", "quantize=nf4", "cache=static", "cache.max_tokens=512")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "Keep the weights of linear layers in 8 bits, or in 4. (quantize=bitsandbytes)" in text
    assert "* quantize.bits=4 (default" in text or "quantize.bits=4" in text
    assert "* cache.max_tokens=512 (default null)" in text
    assert "by the plan: weights -" in text
    assert "https://arxiv.org/abs/2305.14314" in text
    assert "\x1b" not in done.stdout


def test_choices_come_in_the_order_of_the_run() -> None:
    parts = explaining.explain(engine.compose("tiny")).parts
    assert [part.slot for part in parts] == [
        "load", "quantize", "heads", "position_encoding", "attention", "cache", "decode", "task",
    ]  # fmt: skip
    assert all(part.about for part in parts)


def test_costs_are_the_difference_of_two_plans() -> None:
    words = ["heads=grouped", "cache=static", "cache.max_tokens=512"]
    parts = _explained("tiny", *words)

    def plan(*given: str) -> dict[str, int]:
        return priced(check(engine.compose("tiny", given)))

    whole = plan(*words)["KV cache"]
    assert parts["heads"].against_base is not None
    assert parts["heads"].against_base["KV cache"] == whole - plan(*words[1:])["KV cache"]
    assert parts["cache"].against_base is not None
    assert parts["cache"].against_base["KV cache"] == whole - plan(words[0])["KV cache"]
    assert parts["cache"].own is not None
    assert parts["cache"].own["KV cache"] == whole
    assert parts["attention"].against_base == {}
    assert parts["heads"].against_base["KV cache"] < 0 < parts["cache"].against_base["KV cache"]


def test_what_is_not_here_has_no_known_price(engine: Run) -> None:
    done = engine("explain", "base", "model.path=some-org/some-model")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unknown, for the model is not on this machine") == 8


def test_a_refused_recipe_is_explained_and_refused(engine: Run) -> None:
    words = ["tiny", "heads=grouped", "heads.num_key_value_heads=7"]
    done, judged = engine("explain", *words), engine("check", *words)
    assert done.returncode == judged.returncode == 2
    assert "Pool key/value heads" in done.stdout
    assert done.stderr == judged.stderr
    told = engine("explain", *words, "--json")
    found = json.loads(told.stdout)
    assert (told.returncode, found["ok"], len(found["choices"])) == (2, False, 8)
    assert found["problems"] == json.loads(engine("check", *words, "--json").stdout)["problems"]


def test_what_cannot_be_composed_is_told_as_check_tells_it(engine: Run) -> None:
    for flag in ([], ["--json"]):
        done = engine("explain", "tiny", "cache=statik", *flag)
        judged = engine("check", "tiny", "cache=statik", *flag)
        assert done.returncode == judged.returncode == 2
        assert (done.stdout, done.stderr) == (judged.stdout, judged.stderr)


def test_torch_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys, engine; from engine.explaining import explain; "
        "explain(engine.compose('tiny', ['cache=static', 'quantize=nf4'])); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_every_shipped_choice_says_what_it_does() -> None:
    for slot, names in registry.installed().items():
        for name, claims in names.items():
            kind = claims[0].load()
            (first, *_) = explaining._sentences(kind.__doc__)
            assert first.endswith("."), f"{slot}={name}: {first}"


def test_sentences_survive_abbreviations() -> None:
    text = "Pool heads. Ainslie et al. 2023, arXiv 2305.13245, e.g. `nf4`, section 2.1. The end."
    found = explaining._sentences(text)
    assert found == [
        "Pool heads.",
        "Ainslie et al. 2023, arXiv 2305.13245, e.g. `nf4`, section 2.1.",
        "The end.",
    ]
    assert list(explaining._links((found[1],))) == ["https://arxiv.org/abs/2305.13245"]


IMPORTS = """
from dataclasses import dataclass
from typing import Any, ClassVar
import engine
from engine.rules import Rule
"""


@dataclass
class Foreign:
    """Watch. See https://example.org/watching for how."""

    excludes: ClassVar[dict[str, Any]] = {
        "cache.dynamic": Rule(
            code="watch-dynamic", why="it grows", hint="cache=static",
            source="example/watch#7", seen="watch 1.0, 2026-11-22",
        )
    }  # fmt: skip

    @engine.hookimpl
    def observe(self, event: object) -> None: ...


def test_the_home_of_a_third_party_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    origins: Any = registry._origins
    monkeypatch.setitem(origins, ("observe", Foreign), "pytest 1.0")
    recipe = replace(engine.compose("tiny"), observe=Foreign())
    found = explaining.explain(recipe)
    part = next(part for part in found.parts if part.slot == "observe")
    assert part.links[0] == "https://example.org/watching"
    assert any("pytest" in link for link in part.links[1:])
    assert not part.is_default
    (problem,) = found.verdict.problems
    assert problem.source == "example/watch#7 (watch 1.0, 2026-11-22)"


def test_the_source_of_a_rule_is_told(engine: Run, tmp_path: Path) -> None:
    about = tmp_path / "watch-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: watch\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[engine.observe]\nwatch = watching:Foreign\n")
    (tmp_path / "watching.py").write_text(f"{IMPORTS}\n{inspect.getsource(Foreign)}")
    env = {"PYTHONPATH": str(tmp_path)}
    source = "example/watch#7 (watch 1.0, 2026-11-22)"
    for verb in ("check", "explain", "run"):
        done = engine(verb, "tiny", "observe=watch", env=env)
        assert done.returncode == 2, done.stderr
        assert f"  source: {source}" in done.stderr
        told = json.loads(engine(verb, "tiny", "observe=watch", "--json", env=env).stdout)
        assert told["problems"][0]["source"] == source


def test_it_is_a_table_on_a_terminal() -> None:
    parent, child = pty.openpty()
    done = subprocess.run(
        [COMMAND, "explain", "tiny"], stdin=child, stdout=child, stderr=child, check=False,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}, timeout=60,
    )  # fmt: skip
    os.close(child)
    shown = os.read(parent, 65536).decode()
    os.close(parent)
    assert done.returncode == 0
    assert "\x1b[1m" in shown
