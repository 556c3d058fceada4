"""Keep text as it is written: 'no' and '1.10', which YAML and Hydra take for other types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, StringNode

from engine.composing.source import Keys


class Written:
    """How the values of a recipe stand in its files and overrides, where that is not their text."""

    def __init__(self) -> None:
        self._words: dict[Keys, str] = {}

    def note(self, path: Keys, value: Any, written: Mapping[Keys, str]) -> None:
        """Remember how a value is written, in the place of what was written there before.

        Args:
            written: where inside of the value → the word.
        """
        for inner, _ in leaves(value, path):
            over = tuple(map(str, inner))
            for old in [old for old in self._words if old[: len(over)] == over]:
                del self._words[old]
        self._words |= {path + inner: word for inner, word in written.items()}

    def restore(self, config: DictConfig) -> None:
        """Give options that are text the words that were written for them."""
        for path, word in self._words.items():
            node = _node(config, path)
            if isinstance(node, StringNode):
                node._set_value(word)


def leaves(value: Any, path: Keys) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield what is in a mapping of mappings, each with its keys; a list is one value."""
    if isinstance(value, dict) and (value or not path):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def _node(config: DictConfig, path: Keys) -> Any:
    """Return what is at a place, None where there is nothing."""
    node: Any = config
    for key in path:
        if isinstance(node, ListConfig):
            node = node._get_node(int(key)) if key.isdigit() and int(key) < len(node) else None
        elif isinstance(node, DictConfig):
            node = node._get_node(key, validate_access=False)
        else:
            return None
    return node
