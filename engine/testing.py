"""The contract that every plugin keeps, as tests to inherit.

    from acme_recipes.attention import Nearby
    from engine.testing import PluginContract

    class TestNearby(PluginContract):
        plugin = Nearby
        slot = "attention"
        options = {"size": 4}

`pytest` then holds the plugin's class, options and hooks against `engine/hookspecs.py`, and builds
and runs it on a tiny random model. The plugin's package must be installed where the engine is:
`.venv/bin/pip install -e .`, with the engine's `.venv`. `pytest -k window` runs one contract.

Where a hook raises, pytest shows both tracebacks, and on the command line ENGINE_DEBUG=1 does.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

import engine
from engine.calls import HOOKS, PROVIDERS, Chosen
from engine.contexts import DURING
from engine.hooks import Hooks
from engine.hookspecs import SLOTS
from engine.quantizing import trial
from engine.registry import STATE, Choice, installed
from engine.target import Target, resolve

if TYPE_CHECKING:
    from engine.contexts import CheckContext
    from engine.recipe import Recipe
    from engine.session import Session
    from engine.verdict import Verdict

HEAVY = (
    "torch", "transformers", "bitsandbytes", "optimum", "accelerate", "safetensors",
    "huggingface_hub", "numpy", "torchao", "jax", "triton", "flash_attn",
)  # fmt: skip
"""What a plugin's module must not import at its top: listing and checking would pay for it."""

LOSSY = ("load", "quantize", "heads", "position_encoding")
"""Slots whose choices may change the tokens, unless their author says otherwise."""

NEW_TOKENS = 5
PROMPT = "def add(a, b):"

_Answer = tuple[list[int], ...]


class PluginContract:
    """Inherit from this, name your plugin, and pytest does the rest."""

    plugin: ClassVar[type[Any]]
    """The class under test."""
    slot: ClassVar[str]
    """The slot it fills."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Options to run it with; its defaults otherwise."""
    overrides: ClassVar[Sequence[str]] = ()
    """What else the recipe needs, as on the command line: `model.dtype=bfloat16`."""
    family: ClassVar[str] = "llama"
    """The model type of transformers that it is tried on."""
    exact: ClassVar[bool | None] = None
    """Whether greedy tokens must equal those without it; None: as the slot is expected to."""

    _session: ClassVar[Session | None] = None

    @classmethod
    def teardown_class(cls) -> None:
        """Give the model back."""
        if cls._session is not None:
            cls._session.close()
        cls._session = None

    @pytest.fixture(autouse=True)
    def _in_a_folder_of_its_own(
        self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Shared by all contracts of a run, which saves making the model for each.
        folder = tmp_path_factory.getbasetemp() / "contract"
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)

    # -- what it is ---------------------------------------------------------------------------

    def test_it_is_a_dataclass_that_can_be_changed(self) -> None:
        """A recipe sets options, so they are fields, and not frozen."""
        _demand(dataclasses.is_dataclass(self.plugin), f"put @dataclass above {self._name}")
        frozen = self.plugin.__dataclass_params__.frozen
        _demand(not frozen, f"{self._name} is frozen: no override could change its options")
        forgotten = set(inspect.get_annotations(self.plugin)) - {
            field.name for field in dataclasses.fields(self.plugin)
        }
        forgotten = {name for name in forgotten if not self._is_class_variable(name)}
        _demand(not forgotten, f"put @dataclass above {self._name} too: {forgotten} are no options")

    def test_it_says_what_it_does(self) -> None:
        """`engine explain` and the reference show the docstring."""
        text = self.plugin.__doc__ or ""
        given = bool(text) and not text.startswith(f"{self.plugin.__name__}(")
        _demand(given, f"{self._name} needs a docstring: one sentence on what it does")

    def test_its_module_imports_nothing_heavy(self) -> None:
        """Selecting a plugin imports it, and `engine check` answers in a second."""
        code = (
            f"import sys, {self.plugin.__module__}; "
            f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        _demand(done.returncode == 0, f"{self.plugin.__module__} cannot be imported: {done.stderr}")
        found = done.stdout.strip()
        _demand(not found, f"{self.plugin.__module__} imports {found}: do so inside of the hooks")

    def test_it_is_installed_for_its_slot(self) -> None:
        """A recipe finds it by an entry point, which is listed without importing it."""
        _demand(self.slot in SLOTS, f"{self.slot} is no slot; there are: {', '.join(SLOTS)}")
        choice = self._choice()
        found, module = choice.load(), sys.modules.get(self.plugin.__module__)
        _demand(
            found is self.plugin,
            f"{choice.entry.value} of {choice.distribution} is another class than the one under "
            f"test, from {getattr(module, '__file__', module)}: install that one, "
            f"{sys.executable} -m pip install -e .",
        )

    # -- its options --------------------------------------------------------------------------

    def test_a_recipe_can_hold_its_options(self) -> None:
        """Options pass through OmegaConf, and come back as they were."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            node = OmegaConf.merge(OmegaConf.structured(self.plugin), dict(self.options))
            found = OmegaConf.to_object(node)
        except OmegaConfBaseException as error:
            raise AssertionError(
                f"{self._name} has options that a recipe cannot hold: {error}\n"
                "use int, float, bool, str, Enum, list, dict, or one of them | None"
            ) from error
        given = self.plugin(**self.options)
        _demand(
            found == given,
            f"options come back otherwise: {given} → {found}; write lists for tuples and sets",
        )

    def test_options_of_a_wrong_type_are_refused(self) -> None:
        """A type that is checked is an option that cannot be mistyped."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        hints = typing.get_type_hints(self.plugin)
        for field in dataclasses.fields(self.plugin):
            kinds = _kinds(hints[field.name])
            if kinds & {Any, str, bytes, Path}:
                continue  # where text is right, nothing that can be typed is wrong
            try:
                OmegaConf.merge(OmegaConf.structured(self.plugin), {field.name: "no such value"})
            except OmegaConfBaseException:
                continue
            raise AssertionError(f"{self.slot}.{field.name} takes text, though it is {field.type}")

    def test_what_it_declares_is_no_option(self) -> None:
        """Traits and versions are class variables or properties; state is nowhere in a plugin."""
        names = {field.name for field in dataclasses.fields(self.plugin)}
        wrong = names & {"provides", "needs", "excludes", "alarms", "engine_api"}
        _demand(not wrong, f"{', '.join(wrong)}: annotate with ClassVar, or it is an option")
        state = [field.name for field in dataclasses.fields(self.plugin) if not field.init]
        _demand(not state, f"{self._name} has {', '.join(state)} = field(init=False), {STATE}")

    # -- its hooks ----------------------------------------------------------------------------

    def test_its_hooks_are_known_and_take_one_argument(self) -> None:
        """A misspelled hook would never be called."""
        hooks = self._hooks()
        for name in self._answered():
            taken = list(inspect.signature(getattr(self.plugin, name)).parameters)[1:]
            _demand(len(taken) == 1, f"{self._name}.{name} takes {taken or 'nothing'}; one is due")
        answered = any(hooks.answers(hooks.chosen[0], hook) for hook in HOOKS)
        _demand(answered, f"{self._name} has no hook: mark its methods with @engine.hookimpl")

    def test_it_answers_its_slot_and_only_that(self) -> None:
        """Each provider hook is answered by the plugin in the slot of its name."""
        hooks = self._hooks()  # which refuses the hooks of other slots
        if self.slot in PROVIDERS:
            answers = hooks.answers(hooks.chosen[0], self.slot)
            _demand(
                answers,
                f"{self._name} fills {self.slot}, and has no hook {self.slot}: add the method, "
                "marked with @engine.hookimpl; plugins/README.md has an example",
            )
        proves = hooks.answers(hooks.chosen[0], "receipts")
        _demand(
            proves or self.slot == "observe",
            f"{self._name} has no hook receipts, so nothing would prove that it took effect: add "
            "one that yields a Receipt with numbers read from the session",
        )

    def test_check_names_the_problem_and_the_remedy(self) -> None:
        """What is refused is refused in words, whatever the values and the model."""
        for context, plugin in self._nonsense():
            hooks = Hooks([Chosen(self.slot, self._choice().name, plugin)])
            with trial.paused():  # no CPU need multiply by such numbers
                problems = hooks.check(context)
            for problem in problems:
                _demand(problem.slot == self.slot, f"its slot is not {self.slot}: {problem!r}")
                _demand(bool(problem.hint), f"it says nothing about what to type: {problem!r}")

    def test_estimate_gives_memory_and_work(self, tmp_path: Path) -> None:
        """Terms are for one workload, named, and never less than nothing."""
        pricer = self._verdict(tmp_path).pricer
        assert pricer is not None
        passes = (pricer.prompt(2, *pricer.lengths), pricer.token(2, *pricer.lengths))
        for term in (term for each in passes for term in each.terms):
            _demand(bool(term.name), f"a term without a name: {term}")
            least = min(term.bytes, term.launches, term.moved, term.flops, term.seconds)
            _demand(least >= 0, f"less than nothing: {term}")
            _demand(term.during in DURING, f"held during none of {DURING}: {term}")

    # -- what it does -------------------------------------------------------------------------

    def test_it_takes_effect(self, tmp_path: Path) -> None:
        """It builds, proves itself, and answers."""
        session = self._built(tmp_path)
        receipts = [receipt for receipt in session.receipts if receipt.slot == self.slot]
        _demand(bool(receipts) or self.slot == "observe", f"{self._name} gave no receipt")
        for receipt in receipts:
            _demand(bool(receipt.evidence), f"{self._name} proves without evidence: {receipt}")
        tokens = session.generate(PROMPT).token_ids
        _demand(
            len(tokens) == NEW_TOKENS,
            f"with decode.max_new_tokens={NEW_TOKENS} and {self._name}, {NEW_TOKENS} tokens were "
            f"due; the answer has {tokens}",
        )

    def test_it_is_as_exact_as_it_claims(self, tmp_path: Path) -> None:
        """Unless it is lossy, one prompt and a padded batch give the tokens they give without."""
        exact = self.slot not in LOSSY if self.exact is None else self.exact
        if not exact:
            pytest.skip("its author says that it may change the tokens")
        found = _answer(self._built(tmp_path))
        with engine.build(engine.compose("base", self._words())) as session:
            expected = _answer(session)
        _demand(
            found == expected,
            f"greedy tokens with it {found}, without {expected}; if {self._name} may change them, "
            "write exact = False in its contract",
        )

    def test_sessions_can_share_it(self, tmp_path: Path) -> None:
        """What a hook builds is returned, not kept: options are all that a plugin holds."""
        first = self._built(tmp_path)
        plugin = getattr(first.recipe, self.slot)
        before, answer = dict(vars(plugin)), _answer(first)
        with engine.build(first.recipe) as second:
            other = _answer(second)
        _demand(
            dict(vars(plugin)) == before,
            f"building or running changed {self._name}: {before} → {vars(plugin)}; options are all "
            "that it may hold. Keep the rest in what a hook returns (session.built[<hook>]), an "
            "observer in event.kept",
        )
        _demand(other == answer, f"the second session of a recipe answers {other}, not {answer}")
        again = _answer(first)
        _demand(again == answer, f"after a second session, the first answers {again}, not {answer}")

    # -- helpers ------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return self.plugin.__qualname__

    def _is_class_variable(self, name: str) -> bool:
        return "ClassVar" in str(inspect.get_annotations(self.plugin)[name])

    def _answered(self) -> list[str]:
        found = []
        for name in dir(self.plugin):
            marks = getattr(inspect.getattr_static(self.plugin, name), "engine_impl", None)
            if marks and not (marks["wrapper"] or marks["hookwrapper"]):
                found.append(name)
        return found

    def _choice(self) -> Choice:
        value = f"{self.plugin.__module__}:{self.plugin.__qualname__}"
        claims = [claim for names in installed()[self.slot].values() for claim in names]
        found = [claim for claim in claims if claim.entry.value == value]
        _demand(
            bool(found),
            f"no entry point leads to {self._name}. In pyproject.toml:\n"
            f'[project.entry-points."engine.{self.slot}"]\n'
            f'{self.plugin.__name__.lower()} = "{value}"\nand install again: pip install -e .',
        )
        return found[0]

    def _hooks(self) -> Hooks:
        return Hooks([Chosen(self.slot, self._choice().name, self.plugin(**self.options))])

    def _words(self) -> list[str]:
        model = tiny_checkpoint(Path("models").absolute() / self.family, self.family)
        common = [f"model.path={model}", "model.dtype=float32"]
        return [*common, f"decode.max_new_tokens={NEW_TOKENS}", *self.overrides]

    def _recipe(self, folder: Path) -> Recipe:
        """Write a recipe as a user would, and compose it; skip where this machine cannot run it."""
        here = resolve(Target()).traits
        for trait in getattr(self.plugin(**self.options), "needs", {}):
            if trait.startswith("target.") and trait not in here:
                pytest.skip(f"{self._name} needs {trait}, which this machine is not")
        values = {name: _plain(value) for name, value in self.options.items()}
        file = folder / "contract.yaml"
        file.write_text(
            f"defaults: [base, {{override {self.slot}: {self._choice().name}}}, _self_]\n"
            + (f"{self.slot}: {json.dumps(values)}\n" if values else ""),
            encoding="utf-8",
        )
        return engine.compose(file, self._words())

    def _verdict(self, folder: Path) -> Verdict:
        verdict = engine.check(self._recipe(folder))
        _demand(
            verdict.ok,
            f"check refuses {self._name} on a {self.family} of two layers and 128 positions:\n"
            + "\n".join(map(str, verdict.problems))
            + "\nset `options`, `overrides` or `family` of the contract to what it works with",
        )
        return verdict

    def _built(self, folder: Path) -> Session:
        cls = type(self)
        if cls._session is None:
            cls._session = engine.build(self._recipe(folder))
        return cls._session

    def _nonsense(self) -> Iterator[tuple[CheckContext, Any]]:
        """Yield contexts in which little is right, and the plugin with options far out of range."""
        from engine.contexts import CheckContext

        folder = Path("nonsense")
        folder.mkdir(exist_ok=True)
        verdict = self._verdict(folder)
        for shape in (None, verdict.shape, _other_shape(verdict)):
            for value in (None, 0, -1, 10**9):
                plugin = self.plugin(**self.options)
                for field in dataclasses.fields(plugin):
                    if value is not None and type(getattr(plugin, field.name)) in (int, float):
                        setattr(plugin, field.name, type(getattr(plugin, field.name))(value))
                recipe = dataclasses.replace(verdict.recipe, **{self.slot: plugin})
                for traits in (frozenset[str](), frozenset({"nonsense"})):
                    context = CheckContext(
                        recipe=recipe,
                        shape=shape,
                        reshaped=shape,
                        target=verdict.target,
                        traits=traits,
                    )
                    yield context, plugin


def tiny_checkpoint(folder: Path, family: str = "llama") -> Path:
    """Save a random model of two layers with a tokenizer, unless it is there, and return `folder`.

    Args:
        family: a model type of transformers.
    """
    if (folder / "tokenizer.json").exists():
        return folder
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    auto: Any = transformers.AutoModelForCausalLM  # which has no annotations
    fast: Any = transformers.PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    sizes = {
        "vocab_size": len(words), "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "initializer_range": 0.3,  # wide, or one token repeats
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    usual = transformers.AutoConfig.for_model(family)  # a size that it lacks would be believed
    known = {name: value for name, value in sizes.items() if hasattr(usual, name)}
    config = transformers.AutoConfig.for_model(family, **known)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[2] = 0  # nothing ends before its length
    model.save_pretrained(folder)
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def _answer(session: Session) -> _Answer:
    alone = session.generate(PROMPT).token_ids
    together = session.generate(["x", PROMPT])
    return (alone, *(output.token_ids for output in together))


def _other_shape(verdict: Verdict) -> Any:
    """Return the shape of a model that has nothing that a plugin could rely on."""
    shape = verdict.shape
    return shape and dataclasses.replace(shape, model_type="nonsense", traits=frozenset())


def _kinds(hint: Any) -> set[Any]:
    """Return the types that a hint allows."""
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return set(typing.get_args(hint))
    return {hint}


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value


def _demand(holds: bool, otherwise: str) -> None:
    # Not an assert statement: pytest explains those only in modules that it collects itself.
    __tracebackhide__ = True
    if not holds:
        raise AssertionError(otherwise)
