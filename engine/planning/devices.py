"""The devices that recipes can name as targets, and which of them a driver's name means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from engine.recipe import search_folders
from engine.target import Target, problems_of

BRAND = "NVIDIA "
"""Newer drivers put it before the name of a GPU, older ones do not."""


def known_targets() -> Iterator[Target]:
    """Yield the targets that can be named, nearest folders first."""
    yield from map(deepcopy, _known(search_folders()))


@cache
def _known(folders: tuple[Path, ...]) -> tuple[Target, ...]:
    return tuple(_read(folders))


def _read(folders: tuple[Path, ...]) -> Iterator[Target]:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    seen: set[str] = set()
    for folder in folders:
        for file in sorted((folder / "target").glob("*.yaml")):
            if file.stem in seen:
                continue
            seen.add(file.stem)
            # Composing a recipe with a broken one says what is wrong with it.
            with suppress(OSError, ValueError, OmegaConfBaseException, yaml.YAMLError):
                stated = yaml.safe_load(file.read_text("utf-8")) or {}
                typed = OmegaConf.merge(OmegaConf.structured(Target), stated)
                made: Any = OmegaConf.to_object(typed)
                if not list(problems_of(made)):
                    yield replace(made, name=file.stem)  # which is how it is chosen


def with_specification(target: Target) -> Target:
    """Return a target with the figures of the known device that its driver's name means.

    A driver tells memory and bandwidth, but not what the device computes in a second.
    """
    if target.tflops or target.kind == "cpu":
        return target
    name = target.name.removeprefix(BRAND)
    for known in known_targets():
        if name in (each.removeprefix(BRAND) for each in known.devices):
            return replace(
                target,
                tflops=known.tflops,
                bandwidth_gbs=target.bandwidth_gbs or known.bandwidth_gbs,
                launch_us=target.launch_us or known.launch_us,
                efficiency=known.efficiency | target.efficiency,
            )
    return target
