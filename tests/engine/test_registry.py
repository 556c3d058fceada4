"""What is installed is found without importing it; who misbehaves is named."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from engine import hookimpl, registry
from engine.calls import Chosen
from engine.contexts import Attention, KeyValues, Receipt, Term
from engine.errors import PluginError, Problem, RecipeError, RuntimeFailure
from engine.hooks import Hooks

CONTEXT: Any = object()
"""Hooks hand it on without a look."""

Distribute = Callable[..., Path]


@pytest.fixture
def distribute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Distribute]:
    """Return a function that installs a distribution of one module, by hand."""
    before = set(sys.modules)

    def make(
        name: str, entry_points: str, code: str = "", module: str = "", folder: str = ""
    ) -> Path:
        place = tmp_path / (folder or name)
        info = place / f"{name}-1.5.dist-info"
        info.mkdir(parents=True)
        info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        info.joinpath("entry_points.txt").write_text(entry_points)
        place.joinpath(f"{module or name}.py").write_text(code)
        monkeypatch.syspath_prepend(place)
        registry.installed.cache_clear()
        return place

    yield make
    registry.installed.cache_clear()
    for module in set(sys.modules) - before:
        if getattr(sys.modules[module], "__file__", None) and str(tmp_path) in str(
            sys.modules[module].__file__
        ):
            del sys.modules[module]


PLUGIN = "from dataclasses import dataclass\n@dataclass\nclass A:\n    size: int = 1\n"


# -- finding ------------------------------------------------------------------------------------


def test_listing_imports_nothing(distribute: Distribute) -> None:
    distribute("lazy", "[engine.cache]\nlazy = lazy:A\n", "raise SystemError")
    (claim,) = registry.installed()["cache"]["lazy"]
    assert claim.distribution == "lazy 1.5"
    assert "lazy" not in sys.modules


DESCRIBED = '''raise SystemError("imported")
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

class Mode(Enum):
    """How."""
    fast = "fast"
    exact = "exact"

@dataclass
class Base:
    """Not what A says."""
    size: int = 1
    kept: str = "x"

@dataclass
class A(Base):
    """Keep \\d tokens.

    And more.
    """
    size: int = 64
    """Tokens."""
    given: float
    mode: Mode = Mode.fast
    more: list[int] = field(default_factory=list)
    pair: list[int] = field(default_factory=lambda: [1, 2])
    limit: int | None = field(default=None, metadata={})
    provides: ClassVar[tuple[str, ...]] = ()
'''

OPTIONS = [
    ("size", "int", "64"),
    ("kept", "str", "'x'"),
    ("given", "float", ""),
    ("mode", "fast | exact", "fast"),
    ("more", "list[int]", "[]"),
    ("pair", "list[int]", "[1, 2]"),
    ("limit", "int | None", "None"),
]


def _read(slot: str, name: str) -> tuple[str, list[tuple[str, ...]]]:
    about, options = registry.find(slot, name).read()
    return about, [dataclasses.astuple(option) for option in options]


def test_what_a_choice_does_is_read_without_importing_it(distribute: Distribute) -> None:
    distribute("lazy", "[engine.cache]\nlazy = lazy:A\n", DESCRIBED)
    assert _read("cache", "lazy") == ("Keep \\d tokens.", OPTIONS)
    assert "lazy" not in sys.modules


@pytest.mark.parametrize(
    "initial", ["from .deep.inner import A", "from parcel.deep import inner, A as A"]
)
def test_a_class_that_its_package_passes_on_is_read_where_it_is(
    initial: str, distribute: Distribute
) -> None:
    place = distribute("parcel", "[engine.cache]\nlazy = parcel:A [extra]\n")
    place.joinpath("parcel.py").unlink()
    place.joinpath("parcel/deep").mkdir(parents=True)
    place.joinpath("parcel/__init__.py").write_text(f"raise SystemError\n{initial}\n")
    place.joinpath("parcel/deep/__init__.py").write_text("from .inner import A")
    place.joinpath("parcel/deep/inner.py").write_text(DESCRIBED)
    assert _read("cache", "lazy") == ("Keep \\d tokens.", OPTIONS)
    assert "parcel" not in sys.modules


def test_ours_are_read_too() -> None:
    about, options = _read("observe", "trace")
    assert about.startswith("Append to `path`")
    assert options == [("path", "str", "'engine-trace.jsonl'")]
    for slot, names in registry.installed().items():
        for name, (claim,) in names.items():
            plugin = claim.load()
            expected = [field.name for field in dataclasses.fields(plugin)]
            assert [option.name for option in claim.read()[1]] == expected, f"{slot}={name}"
            assert claim.read()[0] == (plugin.__doc__ or "").partition("\n")[0]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("odd:A", "def broken(:"),
        ("odd:A", "\x00"),
        ("odd:A", "from odd import A"),
        ("odd:A", "from . import A"),
        ("odd:A", "class A(A): pass"),
        ("odd:A", "class A: pass"),
        ("odd:A", "x = " + "1+" * 20_000 + "1"),
        ("odd:A", "A = 1"),
        ("odd:B.C", "class B:\n    class C:\n        'No'"),
        ("nowhere.at.all:A", ""),
        ("sys:A", ""),
        ("math:A", ""),
        ("odd", ""),
        ("engine.plugins.nowhere:A", ""),
    ],
)
def test_what_cannot_be_read_is_listed_without_words(
    value: str, code: str, distribute: Distribute
) -> None:
    distribute("odd", f"[engine.cache]\nodd = {value}\n", code)
    assert _read("cache", "odd") == ("", [])


def test_other_groups_are_left_alone(distribute: Distribute) -> None:
    distribute("other", "[engine.nonsense]\na = other:A\n[engine]\nb = other:A\n[x.cache]\nc = o:A")
    assert not {"a", "b", "c"} & {name for names in registry.installed().values() for name in names}


def test_selecting_imports_one(distribute: Distribute) -> None:
    distribute("good", "[engine.cache]\none = good:A\n", PLUGIN)
    distribute("bad", "[engine.cache]\ntwo = bad:A\n", "raise SystemError('no')")
    assert registry.find("cache", "one").load()().size == 1
    assert "bad" not in sys.modules


def test_a_duplicate_hurts_only_who_selects_it(distribute: Distribute) -> None:
    distribute("first", "[engine.cache]\nsame = first:A\nown = first:A\n", PLUGIN)
    distribute("second", "[engine.cache]\nsame = second:A\n", PLUGIN)
    assert registry.find("cache", "own").distribution == "first 1.5"
    with pytest.raises(
        PluginError, match=r"cache=same is claimed by .* 1\.5 and .* 1\.5"
    ) as caught:
        registry.find("cache", "same")
    assert "first 1.5" in str(caught.value)
    assert "second 1.5" in str(caught.value)


def test_one_distribution_twice_on_the_path_is_no_duplicate(distribute: Distribute) -> None:
    for folder in ("checkout", "installed"):
        distribute("twice", "[engine.cache]\none = twice:A\n", PLUGIN, folder=folder)
    assert registry.find("cache", "one").load().__name__ == "A"


def test_one_distribution_may_not_claim_a_name_twice_over(distribute: Distribute) -> None:
    distribute("first", "[engine.cache]\nsame = first:A\n", PLUGIN)
    distribute("first", "[engine.cache]\nsame = first:B\n", PLUGIN, folder="other")
    with pytest.raises(PluginError, match="claimed by first"):
        registry.find("cache", "same")


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(PluginError, match="did you mean cache=dynamic"):
        registry.find("cache", "dynamik")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that"),
        ("1 / 0", "ZeroDivisionError"),
        ("def broken(:", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("B = 1", "AttributeError: module 'odd' has no attribute 'A'"),
        ("class A: pass", "is not a dataclass"),
        ("def A(): pass", "is not a dataclass"),
        (PLUGIN + "A = A()", "is not a dataclass"),
        (PLUGIN.replace("@dataclass", "@dataclass(frozen=True)"), "is a frozen dataclass"),
        (
            PLUGIN.replace("dataclass\n", "dataclass, field\n", 1)
            + "    runs: int = field(default=0, init=False)",
            "has runs = field(init=False), which is state, and a plugin holds options only",
        ),
        (PLUGIN + "    engine_api = '>=2'", "works with hook contract >=2; this is 1.3"),
        (PLUGIN + "    engine_api = 'new'", "engine_api that is no range of versions"),
    ],
)
def test_a_broken_plugin_is_named(code: str, says: str, distribute: Distribute) -> None:
    distribute("odd", "[engine.cache]\nodd = odd:A\n", code)
    with pytest.raises(PluginError) as caught:
        registry.find("cache", "odd").load()
    assert says in str(caught.value)
    assert "cache=odd (odd:A, of odd 1.5)" in str(caught.value)
    assert "uninstall odd 1.5" in str(caught.value)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("    odd: complex = 1j", "has options that a recipe cannot hold"),
        ("    def __post_init__(self): 1 / 0", "refuses its own defaults: division by zero"),
        ("    provides = 'cache.static'", "hook provides: 'cache.static'"),
    ],
)
def test_verifying_finds_what_importing_does_not(
    more: str, says: str, distribute: Distribute
) -> None:
    distribute("odd", "[engine.cache]\nodd = odd:A\n", PLUGIN + more)
    assert registry.find("cache", "odd").load()
    with pytest.raises(PluginError, match=says) as caught:
        registry.find("cache", "odd").verify()
    assert "odd 1.5" in str(caught.value)


def test_verifying_does_not_need_options_that_have_no_default(distribute: Distribute) -> None:
    distribute("odd", "[engine.cache]\nodd = odd:A\n", PLUGIN.replace(" = 1", ""))
    assert registry.find("cache", "odd").verify().__name__ == "A"


def test_a_plugin_for_this_contract_is_taken(distribute: Distribute) -> None:
    distribute("old", "[engine.cache]\nold = old:A\n", PLUGIN + "    engine_api = '>=1,<2'")
    assert registry.find("cache", "old").load().engine_api == ">=1,<2"


def test_a_plugin_that_its_package_passes_on_is_of_its_distribution(distribute: Distribute) -> None:
    place = distribute("passing", "[engine.cache]\np = passing:A\n", "from hidden import A")
    place.joinpath("hidden.py").write_text(PLUGIN)
    plugin = registry.find("cache", "p").load()
    assert Chosen("cache", "preset", plugin()).label == "cache=preset (passing 1.5)"


# -- registering --------------------------------------------------------------------------------


def _hooks(*plugins: Any, slots: str = "attention cache observe") -> Hooks:
    return Hooks(
        Chosen(slot, f"p{index}", plugin)
        for index, (slot, plugin) in enumerate(zip(slots.split(), plugins, strict=False))
    )


@dataclass
class Sdpa:
    answer: Any = None

    @hookimpl
    def attention(self, context: Any) -> Any:
        return Attention(implementation="sdpa") if self.answer is None else self.answer


def test_a_plugin_without_hooks_is_allowed_until_it_is_asked() -> None:
    @dataclass
    class Empty:
        pass

    with pytest.raises(PluginError, match=r"attention=p0 .*gave no answer \(None\)"):
        _hooks(Empty()).attention(CONTEXT)


def test_a_misspelled_hook_gets_a_suggestion() -> None:
    @dataclass
    class Misspelled:
        @hookimpl
        def estimates(self, context: Any) -> None: ...

    with pytest.raises(PluginError, match=r"no hook 'estimates'\n  did you mean estimate\?"):
        _hooks(Misspelled())


def test_a_wrong_argument_is_shown() -> None:
    @dataclass
    class Misnamed:
        @hookimpl
        def attention(self, ctx: Any) -> None: ...

    with pytest.raises(PluginError, match=r"(?s)attention=p0 .*attention\(ctx.*one argument"):
        _hooks(Misnamed())


def test_a_provider_hook_belongs_to_its_slot() -> None:
    @dataclass
    class Both(Sdpa):
        @hookimpl
        def cache(self, context: Any) -> None: ...

    with pytest.raises(PluginError, match="hook cache: only the plugin in the slot cache may"):
        _hooks(Both())


def test_any_slot_may_wrap_a_provider_hook() -> None:
    seen = []

    @dataclass
    class Watching:
        @hookimpl(wrapper=True)
        def attention(self, context: Any) -> Generator[None, Any, Any]:
            seen.append((yield))
            return seen[-1]

    hooks = _hooks(Sdpa(), Watching(), slots="attention observe")
    assert hooks.attention(CONTEXT) is seen[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("provides", "cache.static"),
        ("provides", (1,)),
        ("provides", None),
        ("needs", ("attention.mask",)),
        ("excludes", {"cache.static": 1}),
    ],
)
def test_traits_are_of_their_types(name: str, value: Any) -> None:
    odd: Any = type("Odd", (Sdpa,), {name: value})
    with pytest.raises(PluginError, match=rf"attention=p0 .*hook {name}: "):
        _hooks(odd())


def test_a_trait_that_raises_is_blamed_on_its_plugin() -> None:
    @dataclass
    class Odd(Sdpa):
        @property
        def provides(self) -> tuple[str, ...]:
            raise KeyError("size")

    with pytest.raises(PluginError, match=r"attention=p0 .*raised KeyError"):
        _hooks(Odd())


def test_two_equal_plugins_do_not_meet() -> None:
    one = Hooks([Chosen("attention", "a", Sdpa())])
    other = Hooks([Chosen("attention", "b", Sdpa(Attention(implementation="eager")))])
    assert one.attention(CONTEXT).implementation == "sdpa"
    assert other.attention(CONTEXT).implementation == "eager"


# -- calling ------------------------------------------------------------------------------------


def test_what_is_provided_is_of_its_type() -> None:
    with pytest.raises(PluginError, match="hook attention: gave a str where Attention was due"):
        _hooks(Sdpa("sdpa")).attention(CONTEXT)


def test_what_is_inside_is_of_its_type_too() -> None:
    answer = Attention(implementation=42)  # type: ignore[arg-type]
    with pytest.raises(PluginError, match=r"gave Attention\(implementation=42\), which should be"):
        _hooks(Sdpa(answer)).attention(CONTEXT)


def test_half_an_attention_is_blamed() -> None:
    @dataclass
    class Half:
        @hookimpl
        def attention(self, context: Any) -> Attention:
            return Attention(forward=print)  # type: ignore[arg-type]

    with pytest.raises(PluginError, match="raised ValueError: give forward and mask together"):
        _hooks(Half()).attention(CONTEXT)


@dataclass
class Checking:
    """Gives what it holds, after which it may raise."""

    given: Any = ()
    error: Any = None

    @hookimpl
    def check(self, context: Any) -> Iterator[Problem]:
        yield from self.given
        if self.error:
            raise self.error


def test_problems_come_in_the_order_of_the_slots() -> None:
    first, second = Problem(message="one"), Problem(message="two")
    hooks = _hooks(Checking([first]), Checking([second]))
    assert hooks.check(CONTEXT) == [first, second]


def test_a_generator_that_fails_midway_is_blamed() -> None:
    hooks = _hooks(Checking(), Checking([Problem(message="one")], ValueError("odd")))
    with pytest.raises(PluginError, match=r"cache=p1 .*hook check: raised ValueError: odd"):
        hooks.check(CONTEXT)


def test_a_generator_that_yields_rubbish_is_blamed() -> None:
    with pytest.raises(PluginError, match=r"cache=p1 .*gave a int where Problem was due"):
        _hooks(Checking(), Checking([3])).check(CONTEXT)


def test_refusing_is_no_misbehavior() -> None:
    with pytest.raises(RecipeError, match="not that"):
        _hooks(Checking((), RecipeError("not that"))).check(CONTEXT)


def test_a_full_device_is_nobodys_fault() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    with pytest.raises(RuntimeFailure, match="out of memory: 3 GiB"):
        _hooks(Checking((), OutOfMemoryError("3 GiB"))).check(CONTEXT)


def test_a_string_is_no_list() -> None:
    @dataclass
    class Text:
        @hookimpl
        def estimate(self, context: Any) -> Any:
            return "many"

    with pytest.raises(PluginError, match="returned a str where a list of Term was due"):
        _hooks(Text()).estimate(CONTEXT)


def test_terms_hold_numbers() -> None:
    @dataclass
    class Odd:
        @hookimpl
        def estimate(self, context: Any) -> list[Term]:
            return [Term(name="weights", bytes="12")]  # type: ignore[arg-type]

    with pytest.raises(PluginError, match=r"gave Term\(bytes='12'\), which should be int"):
        _hooks(Odd()).estimate(CONTEXT)


@pytest.mark.parametrize(
    "term",
    [{"bytes": -1}, {"moved": float("nan")}, {"seconds": float("inf")}, {"during": "sleep"}],
)
def test_terms_that_cannot_be_are_blamed_on_their_plugin(term: dict[str, Any]) -> None:
    @dataclass
    class Odd:
        @hookimpl
        def estimate(self, context: Any) -> Iterator[Term]:
            yield Term(name="weights", **term)

    ((field, value),) = term.items()
    with pytest.raises(PluginError, match=f"Term 'weights' (with )?{field}={value!r}"):
        _hooks(Odd()).estimate(CONTEXT)


@dataclass
class Receipting:
    receipt: Any = None
    provides: ClassVar[tuple[str, ...]] = ()

    @hookimpl
    def receipts(self, session: Any) -> list[Any]:
        return [self.receipt]


def test_receipts_are_marked_with_their_plugin() -> None:
    receipt = Receipt(slot="attention", claim="ran", evidence={}, ok=True, plugin="forged")
    assert [one.plugin for one in _hooks(Receipting(receipt)).receipts(CONTEXT)] == ["p0"]


def test_nobody_proves_what_another_did() -> None:
    receipt = Receipt(slot="cache", claim="ran", evidence={}, ok=True)
    with pytest.raises(PluginError, match="gave a receipt for the slot 'cache'"):
        _hooks(Receipting(receipt)).receipts(CONTEXT)


def test_ok_is_yes_or_no() -> None:
    receipt = Receipt(slot="attention", claim="ran", evidence={}, ok="no")  # type: ignore[arg-type]
    with pytest.raises(PluginError, match=r"Receipt\(ok='no'\), which should be bool"):
        _hooks(Receipting(receipt)).receipts(CONTEXT)


def test_prepare_changes_the_model_in_place() -> None:
    @dataclass
    class Other:
        answer: Any

        @hookimpl
        def prepare(self, context: Any) -> Any:
            return self.answer

    class Preparing:
        model = object()

    context: Any = Preparing()
    _hooks(Other(None), Other(context.model)).prepare(context)
    with pytest.raises(PluginError, match=r"cache=p1 .*not the model it got"):
        _hooks(Other(None), Other(object())).prepare(context)


def test_a_cache_that_cannot_be_asked_is_blamed() -> None:
    from transformers import DynamicCache

    class Odd(DynamicCache):
        def get_seq_length(self, layer_idx: int = 0) -> int:
            raise KeyError(layer_idx)

    @dataclass
    class Supplying:
        @hookimpl
        def cache(self, context: Any) -> KeyValues:
            return KeyValues(cache=Odd())

    with pytest.raises(PluginError, match=r"cache=p0 .*raised KeyError"):
        _hooks(Supplying(), slots="cache").cache(CONTEXT)


# -- wrapping -----------------------------------------------------------------------------------


@dataclass
class Wrapping:
    """Wraps two hooks, and answers one of them as well."""

    answer: Any = None
    error: Any = None
    seen: Any = None

    @hookimpl(wrapper=True)
    def attention(self, context: Any) -> Generator[None, Any, Any]:
        answer = yield
        if self.error:
            raise self.error
        return self.answer or answer

    @hookimpl(wrapper=True)
    def check(self, context: Any) -> Generator[None, Any, Any]:
        answer = yield
        self.seen = [*(self.seen or []), len(answer)]
        return answer

    @hookimpl(specname="check")
    def check_myself(self, context: Any) -> list[Problem]:
        return [Problem(message="mine")]


def test_a_wrapper_that_replaces_an_answer_is_blamed_for_it() -> None:
    hooks = _hooks(Sdpa(), Wrapping("flash"), slots="attention observe")
    with pytest.raises(PluginError, match=r"observe=p1 .*hook attention: gave a str"):
        hooks.attention(CONTEXT)


def test_a_wrapper_that_raises_is_blamed_for_it() -> None:
    hooks = _hooks(Sdpa(), Wrapping(error=KeyError("x")), slots="attention observe")
    with pytest.raises(PluginError, match=r"observe=p1 .*hook attention: raised KeyError"):
        hooks.attention(CONTEXT)


def test_a_wrapper_is_not_blamed_for_what_it_wraps() -> None:
    @dataclass
    class Raising:
        @hookimpl
        def attention(self, context: Any) -> Attention:
            raise KeyError("inside")

    hooks = _hooks(Raising(), Wrapping(), slots="attention observe")
    with pytest.raises(PluginError, match=r"attention=p0 .*hook attention: raised KeyError"):
        hooks.attention(CONTEXT)
    hooks = _hooks(Sdpa("rubbish"), Wrapping(), slots="attention observe")
    with pytest.raises(PluginError, match=r"attention=p0 .*gave a str"):
        hooks.attention(CONTEXT)


def test_a_wrapper_sees_every_answer_also_its_own() -> None:
    wrapping = Wrapping()
    hooks = _hooks(Checking(), wrapping, Checking(), slots="attention observe cache")
    assert [problem.message for problem in hooks.check(CONTEXT)] == ["mine"]
    assert wrapping.seen == [1, 1, 1], "once for each plugin that answers"


def test_what_a_hook_returned_is_blamed_on_it_wherever_it_fails() -> None:
    hooks = _hooks(Sdpa(), Checking((), ValueError("later")), slots="attention cache")

    def later() -> None:
        list(hooks.slot("cache").plugin.check(CONTEXT))

    with (
        pytest.raises(PluginError, match=r"cache=p1 .*raised ValueError: later"),
        hooks.blaming(hooks.slot("attention"), "attention"),
    ):
        later()


def test_who_answers_what_can_be_asked() -> None:
    hooks = _hooks(Sdpa(), Wrapping(), slots="attention observe")
    assert hooks.answers(hooks.slot("attention"), "attention")
    assert not hooks.answers(hooks.slot("observe"), "attention"), "it wraps, and does not answer"
    assert hooks.answers(hooks.slot("observe"), "check")
