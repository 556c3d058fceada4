"""What answers without running must not pay for what runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "bitsandbytes", "optimum", "accelerate", "safetensors", "numpy"}


def _modules(code: str) -> set[str]:
    """Run code in a fresh interpreter and return what it imported."""
    script = f"{code}\nimport sys, json; print('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def _command(*arguments: str) -> str:
    return (
        "import sys\nfrom engine.cli import main\n"
        f"sys.argv = ['engine', *{list(arguments)!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code"
    )


CALLS = {
    "import": "import engine; engine.hookimpl",
    "help": _command("--help"),
    "list": _command("list"),
    "show": _command("show", "base", "model.path=some/model"),
    "check": _command("check", "tiny-4bit-gqa"),
    "plan": _command("plan", "octocoder-4bit-rtx3090"),
    "suggestions": _command("plan", "base", "model=mistral-7b", "target=l4"),
}


@pytest.mark.parametrize("call", CALLS)
def test_nothing_heavy_is_imported(call: str) -> None:
    assert not HEAVY & _modules(CALLS[call])


@pytest.mark.parametrize("verb", ["check", "plan"])
def test_a_gguf_file_is_judged_without_torch(
    verb: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("gguf")
    from tests.gguf_files import sample

    sample("phi3-longrope", tmp_path_factory.mktemp("phi3")).write(tmp_path)
    words = (f"model.path={tmp_path}", "load=gguf", "load.file=x.gguf", "target=l4")
    assert HEAVY & _modules(_command(verb, "base", *words)) == {"numpy"}  # which gguf imports


@pytest.mark.parametrize("call", ["check", "plan"])
def test_nothing_that_asks_the_hub_is_imported(call: str) -> None:
    assert "httpx" not in _modules(CALLS[call])


def test_help_composes_nothing() -> None:
    assert not {"hydra", "omegaconf", "yaml", "engine.recipe"} & _modules(CALLS["help"])


@pytest.mark.parametrize("call", ["import", "help", "list"])
def test_no_plugin_is_imported(call: str) -> None:
    found = {name for name in _modules(CALLS[call]) if name.startswith("engine.plugins.")}
    assert not found


def test_check_imports_the_selected_plugins_only() -> None:
    found = {
        name for name in _modules(CALLS["check"]) if name.count(".") == 3 and "plugins" in name
    }
    assert found == {
        "engine.plugins.load.transformers",
        "engine.plugins.quantize.bitsandbytes",
        "engine.plugins.heads.native",
        "engine.plugins.position_encoding.native",
        "engine.plugins.attention.sdpa",
        "engine.plugins.cache.dynamic",
        "engine.plugins.decode.generate",
        "engine.plugins.task.text_generation",
    }


def test_nothing_is_written_by_composing(tmp_path: Path) -> None:
    code = f"import os; os.chdir({str(tmp_path)!r}); import engine; engine.compose('tiny')"
    _modules(code)
    assert list(tmp_path.iterdir()) == []
