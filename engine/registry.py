"""Find what is installed, and call the hooks of what is chosen.

Choices are read from the metadata of installed distributions (entry-point groups `engine.<slot>`),
so listing imports nothing and selecting imports one plugin. Each run has a `Hooks` of its own,
around a pluggy manager that holds only the chosen plugins.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from engine import hookspecs
from engine.errors import (
    EngineError,
    PluginError,
    Problem,
    RuntimeFailure,
    choices_hint,
    nearest,
)
from engine.hookspecs import API_VERSION, SLOTS

if TYPE_CHECKING:
    from engine import contexts
    from engine.contexts import Receipt, Term
    from engine.session import Session

T = TypeVar("T")

PROVIDERS = (
    "position_encoding",
    "heads",
    "quantize",
    "attention",
    "load",
    "cache",
    "decode",
    "task",
)
"""Hooks that only the plugin in the slot of the same name may answer."""

COLLECTING = ("check", "estimate", "prepare", "receipts", "observe")

HOOKS = (*PROVIDERS, *COLLECTING)


_origins: dict[tuple[str, type[Any]], str] = {}
"""Slot and class of each imported plugin → its distribution."""


@dataclass(frozen=True)
class Choice:
    """An installed plugin, not imported."""

    slot: str
    name: str
    entry: metadata.EntryPoint
    distribution: str
    """Name and version, as in 'recipe-engine 0.1.0'."""

    def load(self) -> type[Any]:
        """Import the plugin's class; whatever goes wrong is a `PluginError` that names it."""
        try:
            found = self.entry.load()
        except (Exception, SystemExit) as error:
            raise self._broken(f"cannot be imported: {type(error).__name__}: {error}") from error
        if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            raise self._broken("is not a dataclass; a plugin is a dataclass with hooks as methods")
        if found.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise self._broken("is a frozen dataclass, whose options no recipe could change")
        required = getattr(found, "engine_api", None)
        if required is not None and not self._works_with_us(required):
            raise self._broken(f"works with hook contract {required}; this is {API_VERSION}")
        _origins[self.slot, found] = self.distribution
        return found

    def verify(self) -> type[Any]:
        """Import the class, and hold its options and hooks against the contract."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        found = self.load()
        try:
            OmegaConf.structured(found)
        except OmegaConfBaseException as error:
            why = f"has options that a recipe cannot hold: {str(error).splitlines()[0]}"
            raise self._broken(why) from error
        required = [
            field
            for field in dataclasses.fields(found)
            if field.default is field.default_factory is dataclasses.MISSING
        ]
        if not required:
            try:
                Hooks([Chosen(self.slot, self.name, found())])
            except EngineError:
                raise
            except Exception as error:
                raise self._broken(f"refuses its own defaults: {error}") from error
        return found

    def _works_with_us(self, required: object) -> bool:
        from packaging.specifiers import InvalidSpecifier, SpecifierSet

        try:
            return API_VERSION in SpecifierSet(str(required))
        except InvalidSpecifier as error:
            raise self._broken(
                f"has an engine_api that is no range of versions: {error}"
            ) from error

    def _broken(self, why: str) -> PluginError:
        return PluginError(
            Problem(
                message=f"{self.slot}={self.name} ({self.entry.value}, of {self.distribution}) "
                f"{why}",
                hint=f"mend or uninstall {self.distribution}, or choose another {self.slot}: "
                "engine list --verify shows what works",
                code="plugin-broken",
                slot=self.slot,
            )
        )


@cache
def installed() -> Mapping[str, Mapping[str, tuple[Choice, ...]]]:
    """Return slot → name → what claims that name, from metadata alone.

    More than one claim is kept, for `find` to refuse: it must hurt only those who select the name.
    """
    found: dict[str, dict[str, dict[tuple[str, str], Choice]]] = {slot: {} for slot in SLOTS}
    for distribution in metadata.distributions():
        label = ""
        for entry in distribution.entry_points:
            prefix, _, slot = entry.group.partition(".")
            if prefix != "engine" or slot not in found:
                continue
            label = label or f"{distribution.name} {distribution.version}"
            claims = found[slot].setdefault(entry.name, {})
            # The same distribution can be on the path twice (a checkout beside its install).
            claims.setdefault(
                (distribution.name, entry.value), Choice(slot, entry.name, entry, label)
            )
    return {
        slot: {name: tuple(claims.values()) for name, claims in sorted(names.items())}
        for slot, names in found.items()
    }


def find(slot: str, name: str) -> Choice:
    """Return the one plugin of that name."""
    claims = installed()[slot].get(name, ())
    if len(claims) == 1:
        return claims[0]
    if not claims:
        raise PluginError(
            f"no installed plugin is called {slot}={name}",
            hint=choices_hint(name, installed()[slot], prefix=f"{slot}="),
        )
    owners = " and ".join(claim.distribution for claim in claims)
    raise PluginError(
        Problem(
            message=f"{slot}={name} is claimed by {owners}; which one is meant cannot be told",
            hint=f"uninstall one of {owners}",
            code="plugin-duplicate",
            slot=slot,
        )
    )


@dataclass(frozen=True, eq=False)
class Chosen:
    """A plugin of the run: the slot it fills, the recipe's word for it, and the object."""

    slot: str
    choice: str
    plugin: Any

    @property
    def label(self) -> str:
        """Name the plugin and the distribution it comes from."""
        kind = type(self.plugin)
        origin = _origins.get((self.slot, kind), f"{kind.__module__}:{kind.__qualname__}")
        return f"{self.slot}={self.choice} ({origin})"


class _Seat:
    """Stand for a plugin in pluggy: its answers or its wrappers.

    pluggy wants hashable objects, which option dataclasses are not. Answers and wrappers sit apart,
    so that a hook can be called for one plugin with all wrappers around it.
    """

    def __init__(self, chosen: Chosen, *, wrappers: bool) -> None:
        self.chosen = chosen
        self.wrappers = wrappers
        for name in dir(type(chosen.plugin)):
            # Statically, as pluggy does: looking must not run a property.
            marks = getattr(inspect.getattr_static(type(chosen.plugin), name), "engine_impl", None)
            if marks and bool(marks["wrapper"] or marks["hookwrapper"]) == wrappers:
                setattr(self, name, getattr(chosen.plugin, name))

    def __repr__(self) -> str:
        return f"<{self.chosen.label}>"


class _Watch:
    """Sit inside of all wrappers, to tell a plugin's answer from what wrappers made of it."""

    def __init__(self) -> None:
        self.answers: dict[str, object] = {}
        for hook in HOOKS:
            setattr(self, hook, self._watching(hook))

    def _watching(self, hook: str) -> Callable[[], Generator[None, object, object]]:
        def watch() -> Generator[None, object, object]:
            self.answers[hook] = answer = yield
            return answer

        return hookspecs.hookimpl(wrapper=True, trylast=True)(watch)


class Hooks:
    """Call the chosen plugins' hooks, check what they return, and name who misbehaves."""

    def __init__(self, chosen: Iterable[Chosen]) -> None:
        import pluggy

        self.chosen = tuple(chosen)
        self._manager = pluggy.PluginManager("engine")
        self._manager.add_hookspecs(hookspecs)
        self._hook_of: dict[object, str] = {}
        for one in reversed(self.chosen):  # pluggy calls the last one first
            self._check_traits(one)
            for wrappers in (False, True):
                self._register(_Seat(one, wrappers=wrappers))
        self._watch = _Watch()  # last: of all that ask to be innermost, the last one is
        self._manager.register(self._watch)

    def check(self, context: contexts.CheckContext) -> list[Problem]:
        """Collect what the plugins find wrong."""
        return self._collect("check", context, Problem, message=str, hint=str, code=str, slot=str)

    def estimate(self, context: contexts.EstimateContext) -> list[Term]:
        """Collect the terms of the plan."""
        from engine.contexts import Term

        return self._collect("estimate", context, Term, name=str, bytes=int, seconds=int | float)

    def position_encoding(self, context: contexts.PositionContext) -> contexts.PositionEncoding:
        """Ask how positions are encoded."""
        from transformers import PretrainedConfig

        from engine.contexts import PositionEncoding

        return self._provide(
            "position_encoding", context, PositionEncoding, config=PretrainedConfig
        )

    def heads(self, context: contexts.HeadsContext) -> contexts.Heads:
        """Ask how many key/value heads there are."""
        from transformers import PretrainedConfig

        from engine.contexts import Heads

        return self._provide("heads", context, Heads, config=PretrainedConfig, converters=Sequence)

    def quantize(self, context: contexts.QuantizeContext) -> contexts.Quantization:
        """Ask in how many bits the weights are kept."""
        from transformers.utils.quantization_config import QuantizationConfigMixin

        from engine.contexts import Quantization

        return self._provide(
            "quantize",
            context,
            Quantization,
            config=QuantizationConfigMixin | None,
            finish=Callable | None,
        )

    def attention(self, context: contexts.AttentionContext) -> contexts.Attention:
        """Ask what computes attention."""
        from engine.contexts import Attention

        return self._provide(
            "attention",
            context,
            Attention,
            implementation=str | None,
            forward=Callable | None,
            mask=Callable | None,
        )

    def load(self, context: contexts.LoadContext) -> contexts.Loaded:
        """Have the model made."""
        from transformers import PreTrainedModel, PreTrainedTokenizerBase

        from engine.contexts import Loaded

        return self._provide(
            "load",
            context,
            Loaded,
            model=PreTrainedModel,
            tokenizer=PreTrainedTokenizerBase | None,
        )

    def prepare(self, context: contexts.PrepareContext) -> None:
        """Have every plugin make the model ready, in place."""
        for one, model in self._each("prepare", {"context": context}):
            if model is not context.model:
                self.blame(
                    one,
                    "prepare",
                    f"gave a {type(model).__name__} that is not the model it got; change that one "
                    "in place",
                )

    def cache(self, context: contexts.CacheContext) -> contexts.KeyValues:
        """Ask for the place of keys and values."""
        from transformers import Cache

        from engine.contexts import KeyValues

        values = self._provide("cache", context, KeyValues, cache=Cache | None)
        if values.cache is not None:
            one = self.slot("cache")
            with self.blaming(one, "cache"):
                held = int(values.cache.get_seq_length())
            if held:
                self.blame(
                    one, "cache", f"gave a cache that holds {held} tokens; each must be fresh"
                )
        return values

    def decode(self, context: contexts.DecodeContext) -> contexts.Decoder:
        """Ask for the decoding loop."""
        decoder = self._provide("decode", context, object)
        if not callable(decoder):
            self.blame(
                self.slot("decode"),
                "decode",
                f"returned a {type(decoder).__name__}, which cannot be called",
            )
        return decoder

    def task(self, context: contexts.TaskContext) -> contexts.Task:
        """Ask for what the recipe is for."""
        task: Any = self._provide("task", context, object)
        missing = [
            name
            for name in ("probe", "stream", "batch", "chat")
            if not callable(getattr(task, name, None))
        ]
        if missing:
            self.blame(
                self.slot("task"),
                "task",
                f"returned a {type(task).__name__} without {', '.join(missing)}",
            )
        return task  # type: ignore[no-any-return]

    def receipts(self, session: Session) -> list[Receipt]:
        """Collect the proofs, each marked with the plugin that gave it."""
        from engine.contexts import Receipt

        found: list[Receipt] = []
        types = {"claim": str, "evidence": Mapping, "ok": bool}
        for one, result in self._each("receipts", {"session": session}):
            for receipt in self._listed(one, "receipts", result, Receipt, **types):
                if receipt.slot != one.slot:
                    self.blame(one, "receipts", f"gave a receipt for the slot {receipt.slot!r}")
                found.append(replace(receipt, plugin=one.choice))
        return found

    def observe(self, event: contexts.Event) -> None:
        """Tell everyone who looks on."""
        for _ in self._each("observe", {"event": event}):
            pass

    def slot(self, name: str) -> Chosen:
        """Return what fills a slot."""
        return next(one for one in self.chosen if one.slot == name)

    def answers(self, one: Chosen, hook: str) -> bool:
        """Tell whether a plugin answers a hook."""
        return any(seat.chosen is one and not seat.wrappers for seat in self._seats(hook))

    @contextmanager
    def blaming(self, one: Chosen, hook: str) -> Iterator[None]:
        """Name the author of what is raised inside: a plugin whose code it came from, or `one`."""
        try:
            yield
        except EngineError:
            raise
        except (Exception, SystemExit) as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise RuntimeFailure(
                    f"the device is out of memory: {str(error).splitlines()[0]}",
                    hint="quantize=bitsandbytes, a smaller cache.max_tokens, or a shorter prompt",
                ) from error
            author, hook = self._author(error, one) or (one, hook)
            self.blame(author, hook, f"raised {type(error).__name__}: {error}", error)

    def _register(self, seat: _Seat) -> None:
        import pluggy

        one = seat.chosen
        name = f"{one.slot}={one.choice}"
        try:
            self._manager.register(seat, name=f"{name} (wrappers)" if seat.wrappers else name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise self._misshapen(one, str(error)) from error
        for caller in self._manager.get_hookcallers(seat) or ():
            if not seat.wrappers and caller.name in PROVIDERS and caller.name != one.slot:
                self.blame(
                    one, caller.name, f"only the plugin in the slot {caller.name} may answer this"
                )
            for implementation in caller.get_hookimpls():
                self._hook_of[implementation.function.__code__] = caller.name

    def _misshapen(self, one: Chosen, why: str) -> PluginError:
        hint = f"the hooks are: {', '.join(HOOKS)}"
        if "unknown hook" in why:
            unknown = why.split("'")[1]
            close = nearest(unknown, HOOKS)
            hint = f"did you mean {close}? {hint}" if close else hint
            why = f"there is no hook '{unknown}'"
        else:
            why = "; ".join(why.splitlines())
            hint = "a hook has one argument beside self, named as in engine/hookspecs.py"
        return PluginError(
            Problem(
                message=f"{one.label} does not follow the hook contract: {why}",
                hint=hint,
                code="plugin-contract",
                slot=one.slot,
            )
        )

    def _check_traits(self, one: Chosen) -> None:
        """Read what a plugin declares, before anybody relies on the types."""
        for name, due in (("provides", Collection), ("needs", Mapping), ("excludes", Mapping)):
            with self.blaming(one, name):
                declared = getattr(one.plugin, name, {})
                right = isinstance(declared, due) and not isinstance(declared, str)
                values = declared.values() if isinstance(declared, Mapping) else ()
                right = right and all(isinstance(word, str) for word in (*declared, *values))
            if not right:
                self.blame(
                    one,
                    name,
                    f"{declared!r:.80} where "
                    + (
                        "a tuple of traits was due"
                        if name == "provides"
                        else "a dict was due: trait → what to type instead"
                    ),
                )

    def _provide(self, hook: str, context: object, expected: type[T], **fields: Any) -> T:
        one = self.slot(hook)
        result = self._guarded(one, hook, getattr(self._manager.hook, hook), {"context": context})
        one = self._answerer(hook, one, result)
        if result is None:
            self.blame(one, hook, "gave no answer (None)")
        return self._checked(one, hook, result, expected, fields)

    def _collect(self, hook: str, context: object, expected: type[T], **fields: Any) -> list[T]:
        found: list[T] = []
        for one, result in self._each(hook, {"context": context}):
            found.extend(self._listed(one, hook, result, expected, **fields))
        return found

    def _each(self, hook: str, arguments: Mapping[str, object]) -> Iterator[tuple[Chosen, Any]]:
        # One call per answering plugin, so that each result has a known author; wrappers see each.
        answering = [seat for seat in self._seats(hook) if not seat.wrappers]
        for seat in answering:
            others = [other for other in answering if other is not seat]
            alone = self._manager.subset_hook_caller(hook, others)
            results = self._guarded(seat.chosen, hook, alone, arguments)
            one = self._answerer(hook, seat.chosen, results)
            for result in self._listed(one, hook, results, object):
                yield one, result

    def _listed(
        self, one: Chosen, hook: str, result: Any, expected: type[T], **fields: Any
    ) -> list[T]:
        if not isinstance(result, Iterable) or isinstance(result, str | bytes):
            self.blame(
                one,
                hook,
                f"returned a {type(result).__name__} where a list of {expected.__name__} was due",
            )
        # Hooks are often generators: their body runs here, so errors must be caught here too.
        with self.blaming(one, hook):
            items: list[Any] = list(result)
        return [self._checked(one, hook, item, expected, fields) for item in items]

    def _checked(
        self, one: Chosen, hook: str, result: Any, expected: type[T], fields: Mapping[str, Any]
    ) -> T:
        """Return a result that is of the type that was due, and its fields of theirs."""
        if not isinstance(result, expected):
            self.blame(
                one, hook, f"gave a {type(result).__name__} where {expected.__name__} was due"
            )
        for name, due in fields.items():
            value = getattr(result, name)
            if not isinstance(value, due) or (isinstance(value, str) and due is Sequence):
                self.blame(
                    one,
                    hook,
                    f"gave {expected.__name__}({name}={value!r:.60}), which should be "
                    f"{getattr(due, '__name__', due)}",
                )
        return result

    def _guarded(self, one: Chosen, hook: str, caller: Any, arguments: Mapping[str, object]) -> Any:
        with self.blaming(one, hook):
            return caller(**arguments)

    def _seats(self, hook: str) -> list[_Seat]:
        """Return who implements a hook, in the order of being called."""
        implementations = getattr(self._manager.hook, hook).get_hookimpls()
        seats = dict.fromkeys(one.plugin for one in reversed(implementations))
        return [seat for seat in seats if isinstance(seat, _Seat)]

    def _answerer(self, hook: str, one: Chosen, result: object) -> Chosen:
        """Return who gave a result: the plugin that was asked, or a wrapper that replaced it."""
        if result is self._watch.answers.get(hook):
            return one
        return next((seat.chosen for seat in self._seats(hook) if seat.wrappers), one)

    def _author(self, error: BaseException, one: Chosen) -> tuple[Chosen, str] | None:
        """Return in which plugin's code an error arose, and in which hook, by the inner frames."""
        objects = {id(each.plugin): each for each in self.chosen}
        homes: dict[str, Chosen] = {}
        for each in (one, *self.chosen):
            module = type(each.plugin).__module__
            homes.setdefault(module, each)
            if not module.startswith("engine."):  # the package of a third party
                homes.setdefault(module.partition(".")[0], each)
        found: tuple[Chosen, str] | None = None
        trace = error.__traceback__
        while trace is not None:
            frame, trace = trace.tb_frame, trace.tb_next
            code, module = frame.f_code, str(frame.f_globals.get("__name__", ""))
            own = frame.f_locals.get(code.co_varnames[0]) if code.co_varnames else None
            author = (
                objects.get(id(own)) or homes.get(module) or homes.get(module.partition(".")[0])
            )
            if author is not None:
                hook = found[1] if found and found[0] is author else author.slot
                found = author, self._hook_of.get(code, hook)
        return found

    def blame(
        self, one: Chosen, hook: str, what: str, cause: BaseException | None = None
    ) -> NoReturn:
        """Raise the `PluginError` that names plugin, hook and distribution."""
        raise PluginError(
            Problem(
                message=f"{one.label}, hook {hook}: {what}",
                hint=f"report it to the plugin's author, or choose another {one.slot}",
                code="plugin-failed",
                slot=one.slot,
            )
        ) from cause
