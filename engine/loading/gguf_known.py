"""What a config says of a model, for the keys of a GGUF header to be held against; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.blueprint import drawing
from engine.loading.gguf_header import GgufHeader
from engine.positions import rotary
from engine.shape import WINDOWED, ModelShape

Values = Mapping[str, Any]


class Known:
    """What a config says of a model, its defaults filled in as transformers does."""

    def __init__(self, header: GgufHeader, shape: ModelShape) -> None:
        self.header = header
        self.shape = shape
        try:
            self._made = drawing.configure(shape.config).get_text_config()
        except (
            Exception
        ):  # its code is not known, or stumbles over a value, which is told elsewhere
            self._made = None

    def get(self, *names: str, default: Any = None) -> Any:
        """Return the first of the names that the config has, and that is not null."""
        read = (
            self.shape.config.get
            if self._made is None
            else lambda name: _attribute(self._made, name)
        )
        found = (read(name) for name in names)
        return next((value for value in found if value is not None), default)

    def word(self, names: tuple[str, ...]) -> str:
        """Return which of the names the config uses."""
        return next((name for name in names if self.get(name) is not None), names[0])

    @property
    def rope(self) -> Values:
        """Return the rotary parameters of layers that see the whole context."""
        return next(iter(rotary.far_sighted(self.shape.rope_parameters).values()), {})

    @property
    def window_rope(self) -> Values:
        """Return the rotary parameters of layers with a window."""
        labels = rotary.by_label(self.shape.rope_parameters)
        return next((labels[name] or {} for name in sorted(WINDOWED & labels.keys())), self.rope)

    @property
    def windows(self) -> list[bool]:
        """Tell of each layer whether it has a window."""
        return [kind in WINDOWED for kind in self.shape.layer_types]


def _attribute(made: Any, name: str) -> Any:
    try:
        return getattr(made, name, None)
    except Exception:  # a property of it stumbles over the values
        return None
