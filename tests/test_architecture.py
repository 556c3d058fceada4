"""The house rules, held by reading the code."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import calls, hookspecs, recipe, registry, verdict
from engine.hookspecs import OPTIONAL_SLOTS, SLOTS

ROOT = Path(__file__).resolve().parents[1]
ENGINE = sorted((ROOT / "engine").rglob("*.py"))
PLUGINS = [file for file in sorted((ROOT / "plugins").rglob("*.py")) if file.stem != "__init__"]
HEAVY = {"torch", "transformers", "bitsandbytes", "optimum", "accelerate", "safetensors", "numpy"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def _imports(file: Path, *, top_level: bool = False) -> Iterator[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(file)}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", ENGINE, ids=_name)
def test_the_core_knows_no_plugin(file: Path) -> None:
    assert not [name for name in _imports(file) if name.startswith(("engine.plugins", "plugins"))]


@pytest.mark.parametrize("file", PLUGINS, ids=_name)
def test_no_plugin_imports_another(file: Path) -> None:
    assert not [name for name in _imports(file) if name.startswith(("engine.plugins", "plugins"))]


@pytest.mark.parametrize("file", [*ENGINE, *PLUGINS], ids=_name)
def test_nothing_heavy_at_module_level(file: Path) -> None:
    found = {name.split(".")[0] for name in _imports(file, top_level=True)}
    assert not found & HEAVY


def test_entry_points_are_the_files() -> None:
    """Each plugin's file has an entry point of its name, and each entry point a file."""
    declared = {
        (group.removeprefix("engine."), name, value.split(":")[0])
        for group, names in PROJECT["project"]["entry-points"].items()
        for name, value in names.items()
    }
    files = {
        (
            file.parent.name,
            file.stem.replace("_", "-"),
            f"engine.plugins.{file.parent.name}.{file.stem}",
        )
        for file in PLUGINS
    }
    assert declared == files


def test_every_slot_has_a_folder_and_every_folder_a_slot() -> None:
    folders = {file.parent.name for file in PLUGINS}
    assert folders == set(SLOTS)
    for slot in SLOTS:
        assert f"engine.plugins.{slot}" in PROJECT["tool"]["setuptools"]["packages"]


def test_the_installed_entry_points_are_those_declared() -> None:
    """Entry points are read at install time: after adding one, `pip install -e .`."""
    for slot in SLOTS:
        ours = {
            name
            for name, claims in registry.installed()[slot].items()
            if any(claim.distribution.startswith("recipe-engine ") for claim in claims)
        }
        assert ours == set(PROJECT["project"]["entry-points"][f"engine.{slot}"])


@pytest.mark.parametrize("file", PLUGINS, ids=_name)
def test_every_plugin_has_tests(file: Path) -> None:
    slot, choice = file.parent.name, file.stem.replace("_", "-")
    own = ROOT / "tests/plugins" / slot / f"test_{file.stem}.py"
    tests = [path.read_text("utf-8") for path in own.parent.glob("test_*.py")]
    marks = (f"engine.plugins.{slot}.{file.stem} ", f'"{slot}={choice}"')
    assert own.is_file() or any(mark in text for mark in marks for text in tests), (
        f"{_name(file)} has no tests of its own: write {_name(own)}, against plain transformers, "
        "and with a receipt that must fail when the choice does nothing (CONTRIBUTING.md, step 3)"
    )


@pytest.mark.parametrize("slot", [slot for slot in SLOTS if slot not in OPTIONAL_SLOTS])
def test_every_plugin_answers_its_slot_and_proves_it(slot: str) -> None:
    for name, claims in registry.installed()[slot].items():
        for claim in claims:
            plugin = claim.load()
            assert hasattr(getattr(plugin, slot, None), "engine_impl"), f"{slot}={name}"
            assert hasattr(plugin, "receipts"), f"{slot}={name} gives no receipts"


HOOKS = [*calls.PROVIDERS, *calls.COLLECTING]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented(hook: str) -> None:
    text = getattr(hookspecs, hook).__doc__
    first = text.strip().splitlines()[0]
    assert first.endswith(".")
    assert first.split()[0] in {"Refuse", "Name", "Say", "Supply", "Make", "Prove", "Look"}
    assert ("Provider." in text) != ("Collecting." in text)
    assert "@hookimpl" in text, "an example"
    assert ("Provider." in text) == (hook in calls.PROVIDERS)


def test_the_hooks_are_those_of_the_file() -> None:
    tree = ast.parse((ROOT / "engine/hookspecs.py").read_text(encoding="utf-8"))
    assert sorted(HOOKS) == sorted(n.name for n in tree.body if isinstance(n, ast.FunctionDef))


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_test(hook: str) -> None:
    """A hook that no test mentions is a hook that nobody has tried."""
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")]
    mine = Path(__file__).read_text(encoding="utf-8")
    assert any(f"def {hook}(" in text or f".{hook}(" in text for text in texts if text != mine)


SHIPPED = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "base"])
def test_every_shipped_recipe_composes_and_passes_check(name: str) -> None:
    found = verdict.check(recipe.compose(ROOT / "recipes" / f"{name}.yaml"))
    assert found.problems == []


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_opens_with_its_command(name: str) -> None:
    text = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    comment = [line for line in text.splitlines() if line.startswith("#")]
    commands = (f"engine run {name}", f"engine chat {name}", "engine run -p")
    assert any(command in line for line in comment for command in commands)


def test_every_preset_composes() -> None:
    for slot in SLOTS:
        for file in (ROOT / "recipes" / slot).glob("*.yaml"):
            made = recipe.compose("base", ["model.path=some/model", f"{slot}={file.stem}"])
            assert made.choices[slot] == file.stem


def test_every_choice_has_a_preset_or_a_recipe() -> None:
    texts = {file: file.read_text("utf-8") for file in (ROOT / "recipes").rglob("*.yaml")}
    for slot in SLOTS:
        for choice in PROJECT["project"]["entry-points"][f"engine.{slot}"]:
            chosen = re.compile(rf"^  - (override )?{slot}: {choice}$", re.MULTILINE)
            preset = re.compile(rf"^(defaults:\n)?  - {choice}$", re.MULTILINE)
            assert any(
                chosen.search(text) or (file.parent.name == slot and preset.search(text))
                for file, text in texts.items()
            ), f"{slot}={choice} is in no YAML file under recipes/"


def test_the_reference_is_what_the_code_says() -> None:
    from tools import reference

    assert reference.PAGE.read_text(encoding="utf-8") == reference.page()


def test_the_reference_has_every_type_that_a_hook_gets_or_gives() -> None:
    from tools import reference

    words = {
        node.id
        for name in HOOKS
        for hint in inspect.get_annotations(getattr(hookspecs, name)).values()
        for node in ast.walk(ast.parse(hint))
        if isinstance(node, ast.Name)
    }
    ours = {
        alias.name
        for node in ast.walk(ast.parse(inspect.getsource(hookspecs)))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("engine.")
        for alias in node.names
    }
    page = reference.page()
    missing = [name for name in sorted(words & ours) if f"\n### `{name}`" not in page]
    assert not missing, f"add to MORE in tools/reference.py: {missing}"
    assert {"Problem", "Session", "Decoder"} <= words & ours


def test_no_file_names_a_machine() -> None:
    """Paths of one machine mean nothing on another."""
    suspicious = re.compile(r"(?<![\w./:])/(?:home|root|work|Users)/\w")
    for file in [
        *ENGINE,
        *PLUGINS,
        *(ROOT / "tools").iterdir(),
        *(ROOT / "recipes").glob("*.yaml"),
    ]:
        if file.is_file():
            assert not suspicious.search(file.read_text(encoding="utf-8")), _name(file)
