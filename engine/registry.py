"""Find what is installed: choices are read from metadata, and imported when they are chosen.

Entry-point groups are `engine.<slot>`. Listing imports nothing, selecting imports one plugin. What
a choice does is read from its source, which is parsed and not run.
"""

from __future__ import annotations

import ast
import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

from engine.errors import EngineError, PluginError, Problem, choices_hint
from engine.hookspecs import API_VERSION, SLOTS

_origins: dict[tuple[str, type[Any]], str] = {}
"""Slot and class of each imported plugin → its distribution."""

STATE = (
    "which is state, and a plugin holds options only: sessions may share it, and a recipe could "
    "set it; keep it in what a hook returns (session.built[<hook>]), an observer in event.kept"
)
"""Why an option dataclass may have no `field(init=False)`."""

HOPS = 3
"""Imports and base classes that are followed from one source file to the next."""


@dataclass(frozen=True)
class Option:
    """An option as its class declares it."""

    name: str
    type: str
    """As in the code; of an Enum beside the plugin, its words: 'nf4 | fp4'."""
    default: str
    """As in the code; '' when it must be given."""


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
        state = [field.name for field in dataclasses.fields(found) if not field.init]
        if state:
            raise self._broken(f"has {', '.join(state)} = field(init=False), {STATE}")
        required = getattr(found, "engine_api", None)
        if required is not None and not self._works_with_us(required):
            raise self._broken(f"works with hook contract {required}; this is {API_VERSION}")
        _origins[self.slot, found] = self.distribution
        return found

    def read(self) -> tuple[str, tuple[Option, ...]]:
        """Return the first line of the docstring, and the options, without importing the plugin.

        What the source does not tell (a class made by a function, a compiled module) is left out.
        """
        module, _, name = self.entry.value.partition("[")[0].partition(":")
        try:
            found = _definition(module.strip(), name.strip())
            if found is None:
                return "", ()
            text = ast.get_docstring(found[1]) or ""
            return text.partition("\n")[0], tuple(_options(*found).values())
        except Exception:  # whatever is wrong with it, selecting it says so; here it is one of many
            return "", ()

    def verify(self) -> type[Any]:
        """Import the class, and hold its options and hooks against the contract."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        from engine.calls import Chosen
        from engine.hooks import Hooks

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


def name_of(slot: str, plugin: type[Any], choice: str) -> str:
    """Return the name of a plugin's class, where `choice` may be that of a preset."""
    value = f"{plugin.__module__}:{plugin.__qualname__}"
    claims = installed()[slot]
    names = [name for name, found in claims.items() if any(c.entry.value == value for c in found)]
    return names[0] if names and choice not in names else choice


def origin(slot: str, plugin: type[Any]) -> str:
    """Return the distribution of a plugin's class, or where the class is defined."""
    return _origins.get((slot, plugin), f"{plugin.__module__}:{plugin.__qualname__}")


def _source(module: str) -> tuple[str, list[ast.stmt]]:
    """Return a module's package, and its statements."""
    # Only the top-level package is looked up: finding it imports nothing. Ours is installed from
    # two folders, and `engine` is imported anyway.
    ours = module.startswith("engine.plugins.")
    top = "engine.plugins" if ours else module.partition(".")[0]
    rest = module.removeprefix(top).split(".")[1:]
    spec = find_spec(top)
    places = [Path(place, *rest) for place in (spec and spec.submodule_search_locations) or ()]
    files = [(module, place / "__init__.py") for place in places]
    files += [(module.rpartition(".")[0], place.with_suffix(".py")) for place in places]
    if spec and spec.origin and not places:
        files = [("", Path(spec.origin))]
    package, file = next((package, file) for package, file in files if file.is_file())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the code of others
        return package, ast.parse(file.read_bytes()).body


def _definition(module: str, name: str, hops: int = HOPS) -> tuple[str, ast.ClassDef] | None:
    """Return a class of a module, and the module that defines it."""
    package, body = _source(module)
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and hops:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    origin = resolve_name("." * node.level + (node.module or ""), package)
                    return _definition(origin, alias.name, hops - 1)
    return None


def _options(module: str, node: ast.ClassDef, hops: int = HOPS) -> dict[str, Option]:
    """Return what a class declares, after what it inherits."""
    found: dict[str, Option] = {}
    for base in reversed(node.bases):
        parent = _definition(module, base.id, hops) if isinstance(base, ast.Name) and hops else None
        if parent is not None:
            found |= _options(*parent, hops - 1)
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            kind = ast.unparse(part.annotation)
            if "ClassVar" not in kind:
                name = part.target.id
                words = _words(module, kind)
                found[name] = Option(name, " | ".join(words) or kind, _default(part.value, kind))
    return found


def _words(module: str, kind: str) -> list[str]:
    """Return what a recipe may write for an Enum that is defined in the module."""
    found = _definition(module, kind, hops=0)
    if found is None or not any("Enum" in ast.unparse(base) for base in found[1].bases):
        return []
    given = [part.targets[0] for part in found[1].body if isinstance(part, ast.Assign)]
    return [target.id for target in given if isinstance(target, ast.Name)]


def _default(value: ast.expr | None, kind: str) -> str:
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        factory = given.get("default_factory")
        if isinstance(factory, ast.Lambda):
            return _default(factory.body, kind)
        if factory is not None:
            made = ast.unparse(factory)
            return {"list": "[]", "dict": "{}"}.get(made, f"{made}()")
        return _default(given.get("default"), kind)
    if isinstance(value, ast.Attribute) and ast.unparse(value.value) == kind:
        return value.attr  # of an Enum, as a recipe writes it
    return "" if value is None else ast.unparse(value)
