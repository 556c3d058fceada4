"""Rotate queries and keys just before attention, whatever computes it: keys are cached unrotated.

The cache gives its whole keys for each pass, and each pass rotates them, by frequencies that may be
others than those of the pass before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engine.attending.scores import key_positions, known_positions

if TYPE_CHECKING:
    import torch

    from engine.contexts import Rotation, Turn

Forward = Callable[..., Any]

KINDS = 4
"""Masks of a pass whose rotations are remembered: models have one or two kinds; where layers lie on
several devices, each layer gets a copy of its own."""


class RotatedAttention:
    """A forward of attention, as `engine.contexts.Attention`, and the rotation before it."""

    def __init__(self, forward: Forward, rotation: Rotation, passed: Callable[[], int]) -> None:
        """Rotate by `rotation` before `forward`; `passed` gives a number that each pass changes."""
        self._forward, self._rotation, self._passed = forward, rotation, passed
        self._turns: list[tuple[tuple[Any, ...], tuple[Any, ...], Turn]] = []
        self._at = -1

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        **given: Any,
    ) -> Any:
        """Rotate both, and attend."""
        turn = self._turn(query, key, attention_mask, position_ids)
        query, key = turn(int(getattr(module, "layer_idx", 0)), query, key)
        return self._forward(
            module, query, key, value, attention_mask, position_ids=position_ids, **given
        )

    def _turn(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> Turn:
        """Return what rotates this layer; layers under the same mask share it in a pass."""
        import torch

        tensors = (mask, position_ids)
        sizes = (query.shape[2], key.shape[2], query.device)
        if not torch.compiler.is_compiling():
            if self._at != self._passed():  # in another pass they may be changed in place
                self._turns, self._at = [], self._passed()
            for same, alike, turn in self._turns:
                if alike == sizes and all(a is b for a, b in zip(same, tensors, strict=True)):
                    return turn
        positions = known_positions(position_ids, query.shape[0]).to(query.device)
        keys = key_positions(positions[:, -1], mask, query.shape[2], key.shape[2])
        made = self._rotation(query, positions, keys)
        if not torch.compiler.is_compiling():
            self._turns = [*self._turns[1 - KINDS :], (tensors, sizes, made)]
        return made
