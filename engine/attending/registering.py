"""Make attention known to transformers, with what the position encoding adds to it."""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from engine.attending.masks import never_skipped, with_bias
from engine.attending.rotation import RotatedAttention
from engine.attending.scores import eager
from engine.contexts import Attention
from engine.errors import Problem, RecipeError

if TYPE_CHECKING:
    from engine.contexts import PositionEncoding
    from engine.session import Session

_numbers = itertools.count()


def register(
    session: Session, attention: Attention, positions: PositionEncoding
) -> tuple[Attention, str | None]:
    """Register forward and mask under a name of the session's own, and return both.

    An implementation of transformers goes by its own name, or the model's default by none, where
    positions add nothing.

    Raises:
        RecipeError: where the model or its attention takes nothing from outside.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    one = session.hooks.slot("attention")
    bias, rotation = positions.bias, positions.rotation
    # transformers knows when its own masks need not be made.
    plain = attention.forward is None and bias is None
    if attention.forward is None and (bias is not None or rotation is not None):
        attention = _implementation(session, attention.implementation)
    forward, mask = attention.forward, attention.mask
    if forward is None or mask is None:
        return attention, attention.implementation
    if "model.attention_interface" not in session.shape.traits:
        raise RecipeError(
            Problem(
                message=f"{one.label} brings attention of its own, and the code of "
                f"{session.shape.model_type} takes none from outside",
                hint="attention=native",
                code="attention-interface",
                slot="attention",
            )
        )
    # Without 'sdpa', 'flash', 'flex' or '/': transformers gives names with these a meaning.
    name = f"engine:{next(_numbers)}"

    def counted(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # code would be compiled again for each number
            session.attention_calls += 1
        with session.hooks.blaming(one, "attention"):
            return forward(*args, **kwargs)

    compute: Any = counted
    if rotation is not None:
        rotated = RotatedAttention(counted, rotation, lambda: session.forwarded_tokens)
        positioner = session.hooks.slot("position_encoding")

        def compute(*args: Any, **kwargs: Any) -> Any:
            with session.hooks.blaming(positioner, "position_encoding"):
                return rotated(*args, **kwargs)

    AttentionInterface.register(name, compute)
    if bias is not None:
        mask = with_bias(mask, bias)
    AttentionMaskInterface.register(name, mask if plain else never_skipped(mask))

    def forget() -> None:
        for interface in (AttentionInterface, AttentionMaskInterface):
            with suppress(KeyError):
                del interface._global_mapping[name]

    session.on_close.append(forget)
    return attention, name


def _implementation(session: Session, name: str | None) -> Attention:
    """Return an implementation of transformers as forward and mask, to which positions can add.

    Raises:
        RecipeError: for one that is not made of these two.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    name = name or ("sdpa" if "model.sdpa" in session.shape.traits else "eager")
    if name == "eager":  # which is in each model's own code
        return Attention(forward=eager(), mask=eager_mask)
    forwards: Any = cast(Any, AttentionInterface)()
    masks: Any = cast(Any, AttentionMaskInterface)()
    if name not in forwards or name not in masks:
        one = session.hooks.slot("attention")
        raise RecipeError(
            Problem(
                message=f"{one.label} goes by {name}, to which nothing can be added, and "
                f"position_encoding={session.recipe.choices.get('position_encoding')} needs that",
                hint="attention=native",
                code="attention-fixed",
                slot="attention",
            )
        )
    return Attention(forward=forwards[name], mask=masks[name])
