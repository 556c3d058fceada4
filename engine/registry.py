"""Find what is installed, and call the hooks of what is chosen.

Choices are read from the metadata of installed distributions (entry-point groups `engine.<slot>`),
so listing imports nothing and selecting imports one plugin. Each run has a `Hooks` of its own,
around a pluggy manager that holds only the chosen plugins.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping
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
    from transformers import PreTrainedModel

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
        except Exception as error:
            raise self._broken(f"cannot be imported: {type(error).__name__}: {error}") from error
        if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            raise self._broken("is not a dataclass; a plugin is a dataclass with hooks as methods")
        required = getattr(found, "engine_api", None)
        if required is not None:
            from packaging.specifiers import SpecifierSet

            if API_VERSION not in SpecifierSet(required):
                raise self._broken(f"works with hook contract {required}; this is {API_VERSION}")
        return found

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
        module = type(self.plugin).__module__
        value = f"{module}:{type(self.plugin).__qualname__}"
        for claims in installed().get(self.slot, {}).values():
            for claim in claims:
                if claim.entry.value == value:
                    return f"{self.slot}={self.choice} ({claim.distribution})"
        return f"{self.slot}={self.choice} ({value})"


class _Seat:
    """Stand for a plugin in pluggy: its answers or its wrappers.

    pluggy wants hashable objects, which option dataclasses are not. Answers and wrappers sit apart,
    so that a hook can be called for one plugin with all wrappers around it.
    """

    def __init__(self, chosen: Chosen, *, wrappers: bool) -> None:
        self.chosen = chosen
        for name in dir(type(chosen.plugin)):
            # Statically, as pluggy does: looking must not run a property.
            marks = getattr(inspect.getattr_static(type(chosen.plugin), name), "engine_impl", None)
            if marks and bool(marks["wrapper"] or marks["hookwrapper"]) == wrappers:
                setattr(self, name, getattr(chosen.plugin, name))

    def __repr__(self) -> str:
        return f"<{self.chosen.label}>"


class Hooks:
    """Call the chosen plugins' hooks, check what they return, and name who misbehaves."""

    def __init__(self, chosen: Iterable[Chosen]) -> None:
        import pluggy

        self.chosen = tuple(chosen)
        self._manager = pluggy.PluginManager("engine")
        self._manager.add_hookspecs(hookspecs)
        for one in reversed(self.chosen):  # pluggy calls the last one first
            for wrappers in (False, True):
                self._register(_Seat(one, wrappers=wrappers), wrappers=wrappers)

    def check(self, context: contexts.CheckContext) -> list[Problem]:
        """Collect what the plugins find wrong."""
        return self._collect("check", context, Problem)

    def estimate(self, context: contexts.EstimateContext) -> list[Term]:
        """Collect the terms of the plan."""
        from engine.contexts import Term

        return self._collect("estimate", context, Term)

    def position_encoding(self, context: contexts.PositionContext) -> contexts.PositionEncoding:
        """Ask how positions are encoded."""
        from engine.contexts import PositionEncoding

        return self._provide("position_encoding", context, PositionEncoding)

    def heads(self, context: contexts.HeadsContext) -> contexts.Heads:
        """Ask how many key/value heads there are."""
        from engine.contexts import Heads

        return self._provide("heads", context, Heads)

    def quantize(self, context: contexts.QuantizeContext) -> contexts.Quantization:
        """Ask in how many bits the weights are kept."""
        from engine.contexts import Quantization

        return self._provide("quantize", context, Quantization)

    def attention(self, context: contexts.AttentionContext) -> contexts.Attention:
        """Ask what computes attention."""
        from engine.contexts import Attention

        return self._provide("attention", context, Attention)

    def load(self, context: contexts.LoadContext) -> contexts.Loaded:
        """Have the model made."""
        import torch

        from engine.contexts import Loaded

        loaded = self._provide("load", context, Loaded)
        if not isinstance(loaded.model, torch.nn.Module):
            self.blame(
                self.slot("load"), "load", "returned a Loaded whose model is no torch module"
            )
        return loaded

    def prepare(self, context: contexts.PrepareContext) -> PreTrainedModel:
        """Have every plugin make the model ready, one after the other."""
        from transformers import PreTrainedModel

        for model in self._collect("prepare", context, PreTrainedModel, many=False):
            context = replace(context, model=model)
        return context.model

    def cache(self, context: contexts.CacheContext) -> contexts.KeyValues:
        """Ask for the place of keys and values."""
        from transformers import Cache

        from engine.contexts import KeyValues

        values = self._provide("cache", context, KeyValues)
        if values.cache is not None and not isinstance(values.cache, Cache):
            self.blame(
                self.slot("cache"),
                "cache",
                f"returned a {type(values.cache).__name__} where a transformers.Cache was due",
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
        for one, result in self._each("receipts", {"session": session}):
            found.extend(
                replace(receipt, plugin=one.choice)
                for receipt in self._listed(one, "receipts", result, Receipt)
            )
        return found

    def observe(self, event: contexts.Event) -> None:
        """Tell everyone who looks on."""
        for _ in self._each("observe", {"event": event}):
            pass

    def slot(self, name: str) -> Chosen:
        """Return what fills a slot."""
        return next(one for one in self.chosen if one.slot == name)

    @contextmanager
    def blaming(self, one: Chosen, hook: str) -> Iterator[None]:
        """Name a plugin as the author of what is raised inside."""
        try:
            yield
        except EngineError:
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise RuntimeFailure(
                    f"the device is out of memory: {str(error).splitlines()[0]}",
                    hint="quantize=bitsandbytes, a smaller cache.max_tokens, or a shorter prompt",
                ) from error
            self.blame(one, hook, f"raised {type(error).__name__}: {error}", error)

    def _register(self, seat: _Seat, *, wrappers: bool) -> None:
        import pluggy

        one = seat.chosen
        name = f"{one.slot}={one.choice}"
        try:
            self._manager.register(seat, name=f"{name} (wrappers)" if wrappers else name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            known = [*PROVIDERS, *COLLECTING]
            unknown = next((word for word in str(error).split("'") if word.isidentifier()), "")
            close = nearest(unknown, known) if "unknown hook" in str(error) else ""
            hint = f"did you mean {close}? " if close else ""
            raise PluginError(
                Problem(
                    message=f"{one.label} does not follow the hook contract: {error}",
                    hint=f"{hint}the hooks are: {', '.join(known)}",
                    code="plugin-contract",
                    slot=one.slot,
                )
            ) from error
        for caller in self._manager.get_hookcallers(seat) or ():
            for implementation in caller.get_hookimpls():
                mine = implementation.plugin is seat
                wraps = implementation.wrapper or implementation.hookwrapper
                if mine and not wraps and caller.name in PROVIDERS and caller.name != one.slot:
                    self.blame(
                        one,
                        caller.name,
                        f"only the plugin in the slot {caller.name} may answer this",
                    )

    def _provide(self, hook: str, context: object, expected: type[T]) -> T:
        one = self.slot(hook)
        result = self._guarded(one, hook, getattr(self._manager.hook, hook), {"context": context})
        if result is None:
            self.blame(one, hook, "gave no answer (None)")
        if not isinstance(result, expected):
            self.blame(
                one, hook, f"returned a {type(result).__name__} where {expected.__name__} was due"
            )
        return result

    def _collect(
        self, hook: str, context: object, expected: type[T], *, many: bool = True
    ) -> list[T]:
        found: list[T] = []
        for one, result in self._each(hook, {"context": context}):
            found.extend(self._listed(one, hook, result if many else [result], expected))
        return found

    def _each(self, hook: str, arguments: Mapping[str, object]) -> Iterator[tuple[Chosen, Any]]:
        # One call per answering plugin, so that each result has a known author; wrappers see each.
        caller = getattr(self._manager.hook, hook)
        answering = [
            implementation.plugin
            for implementation in caller.get_hookimpls()
            if not (implementation.wrapper or implementation.hookwrapper)
        ]
        for seat in reversed(answering):
            others = [other for other in answering if other is not seat]
            alone = self._manager.subset_hook_caller(hook, others)
            results = self._guarded(seat.chosen, hook, alone, arguments)
            for result in self._listed(seat.chosen, hook, results, object):
                yield seat.chosen, result

    def _listed(self, one: Chosen, hook: str, result: Any, expected: type[T]) -> list[T]:
        # Hooks are often generators: their body runs here, so errors must be caught here too.
        if not isinstance(result, Iterable) or isinstance(result, str | bytes):
            self.blame(
                one,
                hook,
                f"returned a {type(result).__name__} where a list of {expected.__name__} was due",
            )
        with self.blaming(one, hook):
            items: list[Any] = list(result)
        for item in items:
            if not isinstance(item, expected):
                self.blame(
                    one, hook, f"gave a {type(item).__name__} where {expected.__name__} was due"
                )
        return items

    def _guarded(self, one: Chosen, hook: str, caller: Any, arguments: Mapping[str, object]) -> Any:
        try:
            return caller(**arguments)
        except Exception as error:
            with self.blaming(self._author(error, hook) or one, hook):
                raise

    def _author(self, error: BaseException, hook: str) -> Chosen | None:
        # A wrapper may be the one that failed: the innermost frame that is a hook's code tells.
        code = {
            implementation.function.__code__: implementation.plugin.chosen
            for implementation in getattr(self._manager.hook, hook).get_hookimpls()
        }
        author: Chosen | None = None
        frame = error.__traceback__
        while frame is not None:
            author = code.get(frame.tb_frame.f_code, author)
            frame = frame.tb_next
        return author

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
