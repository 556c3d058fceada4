"""The contract suite finds what it is there to find: each check fails on a plugin that is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest

from engine import hookimpl, registry
from engine.contexts import Attention, Receipt
from engine.errors import PluginError, Problem
from engine.testing import PluginContract, tiny_checkpoint


def _contract(plugin: type[Any], slot: str = "attention", **settings: Any) -> PluginContract:
    kind = type("Contract", (PluginContract,), {"plugin": plugin, "slot": slot, **settings})
    made: PluginContract = kind()
    return made


class Mode(Enum):
    fast = "fast"


@dataclass
class Good:
    """Compute attention as PyTorch does."""

    size: int = 3
    mode: str = "fast"
    provides: ClassVar[tuple[str, ...]] = ("attention.test",)

    @hookimpl
    def attention(self, context: Any) -> Attention:
        return Attention(implementation="sdpa")

    @hookimpl
    def receipts(self, session: Any) -> Iterator[Receipt]:
        yield Receipt(slot="attention", claim="ran", evidence={"size": self.size}, ok=True)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that installs a class of this module as attention=test."""

    def install(plugin: type[Any], slot: str = "attention", name: str = "test") -> None:
        plugin.__qualname__ = plugin.__name__  # as if it stood at the top of this module
        value = f"{plugin.__module__}:{plugin.__qualname__}"
        entry = EntryPoint(name, value, f"engine.{slot}")
        found = {**registry.installed()}
        claim = registry.Choice(slot, name, entry, "test 1.0")
        found[slot] = {**found[slot], name: (claim,)}
        for module in ("engine.registry", "engine.testing"):
            monkeypatch.setattr(f"{module}.installed", lambda: found)
        monkeypatch.setattr(sys.modules[__name__], plugin.__qualname__, plugin, raising=False)

    return install


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_is_no_dataclass() -> None:
    class Plain:
        pass

    with pytest.raises(AssertionError, match="put @dataclass above"):
        _contract(Plain).test_it_is_a_dataclass_that_can_be_changed()


def test_what_is_frozen() -> None:
    @dataclass(frozen=True)
    class Frozen:
        size: int = 1

    with pytest.raises(AssertionError, match="frozen"):
        _contract(Frozen).test_it_is_a_dataclass_that_can_be_changed()


def test_a_decorator_that_was_forgotten_on_a_subclass() -> None:
    class Forgotten(Good):
        extra: int = 1

    with pytest.raises(AssertionError, match="'extra'"):
        _contract(Forgotten).test_it_is_a_dataclass_that_can_be_changed()
    _contract(Good).test_it_is_a_dataclass_that_can_be_changed()


def test_what_says_nothing() -> None:
    @dataclass
    class Silent:
        size: int = 1

    assert Silent.__doc__, "dataclass writes one, which is not what is meant"
    with pytest.raises(AssertionError, match="docstring"):
        _contract(Silent).test_it_says_what_it_does()
    _contract(Good).test_it_says_what_it_does()


def test_what_imports_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from dataclasses import dataclass\n@dataclass\nclass A: ...\n"
    (tmp_path / "imports_torch.py").write_text(f"import torch\n{code}")
    (tmp_path / "imports_little.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AssertionError, match=r"imports torch.*inside of the hooks"):
        _contract(import_module("imports_torch").A).test_its_module_imports_nothing_heavy()
    _contract(import_module("imports_little").A).test_its_module_imports_nothing_heavy()


def test_what_is_not_installed() -> None:
    with pytest.raises(AssertionError, match=r'\[project.entry-points."engine.attention"\]'):
        _contract(Good).test_it_is_installed_for_its_slot()
    with pytest.raises(AssertionError, match="atention is no slot"):
        _contract(Good, "atention").test_it_is_installed_for_its_slot()


def test_options_that_no_recipe_holds() -> None:
    @dataclass
    class Odd:
        size: complex = 1j

    with pytest.raises(AssertionError, match="options that a recipe cannot hold"):
        _contract(Odd).test_a_recipe_can_hold_its_options()


def test_options_that_come_back_otherwise() -> None:
    @dataclass
    class Odd:
        sizes: tuple[int, ...] = (1, 2)

    with pytest.raises(AssertionError, match="come back otherwise"):
        _contract(Odd).test_a_recipe_can_hold_its_options()
    _contract(Good, options={"size": 7}).test_a_recipe_can_hold_its_options()


def test_options_that_may_be_text_are_left_alone() -> None:
    @dataclass
    class Typed:
        anything: Any = 3
        path: Path = Path("x")
        mode: Mode = Mode.fast
        more: list[int] = field(default_factory=list)
        size: int | None = None

    _contract(Typed).test_options_of_a_wrong_type_are_refused()


def test_a_trait_that_became_an_option() -> None:
    @dataclass
    class Odd:
        provides: str = "cache.static"

    with pytest.raises(AssertionError, match="provides: annotate with ClassVar"):
        _contract(Odd).test_what_it_declares_is_no_option()


def test_state_that_became_an_option(installed: Any) -> None:
    @dataclass
    class Odd(Good):
        runs: int = field(default=0, init=False)

    with pytest.raises(AssertionError, match=r"Odd has runs = field\(init=False\), which is state"):
        _contract(Odd).test_what_it_declares_is_no_option()
    installed(Odd)
    with pytest.raises(PluginError, match=r"attention=test .*has runs = field\(init=False\)"):
        registry.find("attention", "test").load()


def test_what_check_refuses_everywhere(installed: Any, tmp_path: Path) -> None:
    @dataclass
    class Picky(Good):
        @hookimpl
        def check(self, context: Any) -> Iterator[Problem]:
            yield Problem(slot="attention", message="no cores", hint="attention=eager")

    installed(Picky)
    with pytest.raises(AssertionError, match=r"refuses Picky.*\nno cores\n  attention=eager\nset"):
        _contract(Picky).test_estimate_gives_memory_and_work(tmp_path)


def test_a_hook_without_its_argument(installed: Any) -> None:
    @dataclass
    class Alone(Good):
        @hookimpl
        def prepare(self) -> None: ...

    installed(Alone)
    with pytest.raises(AssertionError, match=r"prepare takes nothing; one is due"):
        _contract(Alone).test_its_hooks_are_known_and_take_one_argument()


def test_a_slot_that_is_not_answered(installed: Any) -> None:
    @dataclass
    class Idle:
        @hookimpl
        def receipts(self, session: Any) -> None: ...

    installed(Idle)
    with pytest.raises(AssertionError, match="has no hook attention"):
        _contract(Idle).test_it_answers_its_slot_and_only_that()


def test_a_plugin_that_proves_nothing(installed: Any) -> None:
    @dataclass
    class Unproven:
        @hookimpl
        def attention(self, context: Any) -> Attention:
            return Attention()

    installed(Unproven)
    with pytest.raises(AssertionError, match="has no hook receipts"):
        _contract(Unproven).test_it_answers_its_slot_and_only_that()


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        (Problem(slot="attention", message="no"), "nothing about what to type"),
        (Problem(slot="", message="no", hint="attention=sdpa"), "its slot is not attention"),
    ],
)
def test_problems_without_a_remedy(problem: Problem, says: str, installed: Any) -> None:
    @dataclass
    class Refusing(Good):
        @hookimpl
        def check(self, context: Any) -> Iterator[Problem]:
            if self.size < 0:
                yield problem

    installed(Refusing)
    with pytest.raises(AssertionError, match=says):
        _contract(Refusing).test_check_names_the_problem_and_the_remedy()


def test_the_whole_suite_on_what_is_right(installed: Any, tmp_path: Path) -> None:
    installed(Good)
    contract = _contract(Good, options={"size": 5})
    contract.test_it_is_installed_for_its_slot()
    contract.test_its_hooks_are_known_and_take_one_argument()
    contract.test_it_answers_its_slot_and_only_that()
    contract.test_check_names_the_problem_and_the_remedy()
    contract.test_estimate_gives_memory_and_work(tmp_path)
    try:
        contract.test_it_takes_effect(tmp_path)
        contract.test_it_is_as_exact_as_it_claims(tmp_path)
        contract.test_sessions_can_share_it(tmp_path)
    finally:
        type(contract).teardown_class()


def test_tokens_that_change_without_a_word(installed: Any, tmp_path: Path) -> None:
    """An attention that sees only a token itself is exact for nobody."""

    @dataclass
    class Narrow(Good):
        """Attend to nothing else."""

        @hookimpl
        def attention(self, context: Any) -> Attention:
            from transformers.masking_utils import sdpa_mask

            def forward(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
                groups = query.shape[1] // value.shape[1]
                own = value[:, :, -query.shape[2] :].repeat_interleave(groups, 1)
                return own.transpose(1, 2).contiguous(), None

            return Attention(forward=forward, mask=sdpa_mask)

    installed(Narrow)
    contract = _contract(Narrow)
    try:
        contract.test_it_takes_effect(tmp_path)
        with pytest.raises(AssertionError, match="greedy tokens with it"):
            contract.test_it_is_as_exact_as_it_claims(tmp_path)
    finally:
        type(contract).teardown_class()
    with pytest.raises(pytest.skip.Exception):
        _contract(Narrow, exact=False).test_it_is_as_exact_as_it_claims(tmp_path)


def test_a_plugin_that_remembers(installed: Any, tmp_path: Path) -> None:
    @dataclass
    class Counting(Good):
        """Count the sessions, which is not an option's business."""

        @hookimpl
        def attention(self, context: Any) -> Attention:
            self.size += 1
            return Attention(implementation="sdpa")

    installed(Counting)
    contract = _contract(Counting)
    try:
        with pytest.raises(AssertionError, match=r"changed .*'size': 4.*'size': 5.*event\.kept"):
            contract.test_sessions_can_share_it(tmp_path)
    finally:
        type(contract).teardown_class()


def test_the_model_is_made_once(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "llama")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny_checkpoint(folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
