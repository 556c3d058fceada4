"""The devices that recipes can name as targets, and which of them a driver's name means."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

from engine.recipe import search_folders
from engine.target import Target

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

    seen: set[str] = set()
    for folder in folders:
        for file in sorted((folder / "target").glob("*.yaml")):
            if file.stem in seen:
                continue
            seen.add(file.stem)
            try:
                yield Target(**(yaml.safe_load(file.read_text("utf-8")) or {}))
            except (OSError, ValueError, TypeError, yaml.YAMLError):
                continue  # composing a recipe with it says what is wrong with it


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
