"""Call hooks of the chosen plugins through pluggy, and name who misbehaves.

Each run has a manager of its own that holds only the chosen plugins. pluggy calls; this module
knows whose answer a result is, checks its type, and follows an error to the plugin it came from.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import pluggy

from engine import hookspecs, registry
from engine.errors import EngineError, PluginError, Problem, RuntimeFailure, nearest
from engine.rules import Rule

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

COLLECTING = ("configure", "reshape", "check", "estimate", "prepare", "receipts", "observe")

OWNERS = {**{hook: hook for hook in PROVIDERS}, "configure": "load"}
"""Hooks that only one slot's plugin may answer → that slot."""

HOOKS = (*PROVIDERS, *COLLECTING)

_ASYNC = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


@dataclass(frozen=True, eq=False)
class Chosen:
    """A plugin of the run: the slot it fills, the recipe's word for it, and the object."""

    slot: str
    choice: str
    plugin: Any

    @property
    def label(self) -> str:
        """Name the plugin and the distribution it comes from."""
        return f"{self.slot}={self.choice} ({registry.origin(self.slot, type(self.plugin))})"


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


class Calls:
    """The chosen plugins, and safe ways to call a hook of theirs."""

    def __init__(self, chosen: Iterable[Chosen]) -> None:
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
        except (Exception, SystemExit, GeneratorExit) as error:
            found = self._author(error, one)
            if found is None and isinstance(error, GeneratorExit):
                raise  # a reader closed the stream
            if type(error).__name__ == "OutOfMemoryError":
                raise RuntimeFailure(
                    f"the device is out of memory: {str(error).splitlines()[0]}",
                    hint="quantize=bitsandbytes, a smaller cache.max_tokens, or a shorter prompt",
                ) from error
            author, hook = found or (one, hook)
            self.blame(author, hook, f"raised {type(error).__name__}: {error}", error)

    def _register(self, seat: _Seat) -> None:
        one = seat.chosen
        name = f"{one.slot}={one.choice}"
        try:
            self._manager.register(seat, name=f"{name} (wrappers)" if seat.wrappers else name)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise self._misshapen(one, str(error)) from error
        for caller in self._manager.get_hookcallers(seat) or ():
            owner = OWNERS.get(caller.name, one.slot)
            if not seat.wrappers and owner != one.slot:
                self.blame(one, caller.name, f"only the plugin in the slot {owner} may answer this")
            for implementation in caller.get_hookimpls():
                self._hook_of[implementation.function.__code__] = caller.name
                if implementation.function.__code__.co_flags & _ASYNC:
                    why = f"{caller.name} is an 'async def', and hooks are not awaited"
                    raise self._misshapen(one, why)

    def _misshapen(self, one: Chosen, why: str) -> PluginError:
        hint = f"the hooks are: {', '.join(HOOKS)}"
        if "unknown hook" in why:
            unknown = why.split("'")[1]
            close = nearest(unknown, HOOKS)
            hint = f"did you mean {close}? {hint}" if close else hint
            why = f"there is no hook '{unknown}'"
        elif "async def" in why:
            hint = "write it with 'def', and run what is asynchronous inside: asyncio.run(…)"
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
        for name, due in (
            ("provides", Collection),
            ("needs", Mapping),
            ("excludes", Mapping),
            ("alarms", Mapping),
        ):
            with self.blaming(one, name):
                declared = getattr(one.plugin, name, {})
                right = isinstance(declared, due) and not isinstance(declared, str)
                values = declared.values() if isinstance(declared, Mapping) else ()
                right = right and all(isinstance(word, str) for word in declared)
                kinds = Rule if name == "alarms" else str | Rule
                right = right and all(isinstance(value, kinds) for value in values)
            if not right:
                self.blame(
                    one,
                    name,
                    f"{declared!r:.80} where "
                    + (
                        "a tuple of traits was due"
                        if name == "provides"
                        else "a dict was due: trait → what to type instead, or a Rule"
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

    def _each(
        self, hook: str, arguments: Mapping[str, object], only: Chosen | None = None
    ) -> Iterator[tuple[Chosen, Any]]:
        # One call per answering plugin, so that each result has a known author; wrappers see each.
        answering = [seat for seat in self._seats(hook) if not seat.wrappers]
        for seat in answering:
            if only is not None and seat.chosen is not only:
                continue
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
        # Taken out: what was answered belongs to the session, and must go when that is closed.
        if result is self._watch.answers.pop(hook, None):
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
