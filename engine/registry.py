"""Find what is installed: choices are read from metadata, and imported when they are chosen.

Entry-point groups are `engine.<slot>`. Listing imports nothing, selecting imports one plugin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from engine.errors import EngineError, PluginError, Problem, choices_hint
from engine.hookspecs import API_VERSION, SLOTS

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


def origin(slot: str, plugin: type[Any]) -> str:
    """Return the distribution of a plugin's class, or where the class is defined."""
    return _origins.get((slot, plugin), f"{plugin.__module__}:{plugin.__qualname__}")
