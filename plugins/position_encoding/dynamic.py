"""position_encoding=dynamic: rotary positions that stretch only as far as the text is long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from engine import hookimpl
from engine.attending import costs
from engine.contexts import (
    CheckContext,
    EstimateContext,
    PositionContext,
    PositionEncoding,
    PrepareContext,
    Receipt,
    ReshapeContext,
    Term,
)
from engine.errors import Problem
from engine.positions import rotary
from engine.positions.late_rope import number_tokens, unrotated, unsuitable
from engine.positions.late_rotation import LateRotation, receipt
from engine.rules import Rule

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from engine.session import Session
    from engine.shape import ModelShape

YARN = "position_encoding=yarn, whose frequencies never change"
CACHE = Rule(
    code="dynamic-rope-cache",
    why="each new token changes the frequencies, so cached keys must be rotated anew",
    hint=f"cache=none, or {YARN}",
    source="arXiv 2309.00071, section 3.3, and dynamic_frequency_update in "
    "transformers.modeling_rope_utils",
    seen="transformers 5.23.0, 2026-11-28",
)
KEPT = Rule(
    code="dynamic-rope-kept",
    why="beyond the trained length, what is cached of earlier tokens was computed with the "
    "frequencies of a shorter text, and only the rotation of keys is renewed, so that answers may "
    "differ from those without a cache",
    hint="cache=none, which computes all tokens anew for each new one",
    source="arXiv 2309.00071, section 3.3",
    seen="transformers 5.23.0, 2026-11-28",
)


@dataclass
class Dynamic:
    """Raise the rotary base with the length of the text: dynamic NTK.

    Peng et al. 2023, arXiv 2309.00071, section 3.3 ("dynamic scaling") with the base of section 3.1
    ("NTK-aware"): beyond the trained length L, the base of a text of n tokens is multiplied by
    `(alpha * n / L - (alpha - 1)) ** (d / (d - 2))`; up to L it is the trained one. An `alpha` of 1
    is the paper's; None takes `factor`, as transformers does, which stretches further than needed.
    Texts may become `factor` times L long. In a batch, each row has the frequencies of its own
    length.

    Each new token changes the frequencies, and so the keys of all tokens before it. As the paper
    asks, caches keep keys unrotated, and each pass rotates all of them: that is the price, some
    ten operators over a layer's keys, and a copy of these. Keys and values above the first layer
    also depend on the frequencies of the pass that computed them, and stay as they are: beyond L
    answers may differ from those of cache=none, which computes all tokens anew for each new one,
    as transformers does without a cache. Up to L they are the same.
    """

    factor: float = 4.0
    alpha: float | None = None

    provides: ClassVar[tuple[str, ...]] = ("position.varies", "position.rotation")
    alarms: ClassVar[dict[str, Rule]] = dict.fromkeys(
        ("cache.dynamic", "cache.static", "cache.quantized", "cache.evicting"), KEPT
    )

    @hookimpl
    def reshape(self, context: ReshapeContext) -> ModelShape | None:
        """Make the context longer."""
        return rotary.longer(context.shape, self.factor)

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse models without rotary positions, and values that stretch nothing."""
        if context.shape is not None:
            refused = list(rotary.refusals("dynamic", "dynamic", context.shape))
            yield from refused or _unable(context, context.shape)
        yield from rotary.outside(
            self,
            rotary.stretch(self.factor, "4"),
            ("alpha", self.alpha is None or self.alpha >= 1, "must be 1 or more", "null"),
        )

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price the keys of a layer that are rotated, in each pass."""
        yield from costs.rotating(context)

    @hookimpl
    def position_encoding(self, context: PositionContext) -> PositionEncoding:
        """Edit the rotary parameters; the context stays, since the formula reads L there.

        Where a cache keeps keys, the model's own code rotates nothing, and the core does.
        """
        parameters = {"rope_type": "dynamic", "factor": self._alpha}
        config = rotary.edited("dynamic", context.config, parameters)
        if "cache.none" in context.traits:
            return PositionEncoding(config=config)
        text = config.get_text_config()
        (label,) = rotary.far_sighted(text.rope_parameters)
        trained, alpha = rotary.context_of(context.config), self._alpha

        def frequencies(usual: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            return stretched(usual, tokens, trained, alpha)

        rotation = LateRotation(context.config, config, frequencies, label)
        return PositionEncoding(config=unrotated(config, label), rotation=rotation)

    @hookimpl
    def prepare(self, context: PrepareContext) -> PreTrainedModel:
        """Let each pass compute its own frequencies, of the tokens behind the padding."""
        rotary.forget_lengths(context.model)
        number_tokens(context.model)
        return context.model

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Compare the frequencies at the end of the new context with the checkpoint's."""
        claim, end = "the rotary base rises with the length of the text", session.context_tokens
        rotation = session.built["position_encoding"].rotation
        if isinstance(rotation, LateRotation):
            yield receipt(session, rotation, f"{claim}, for cached keys too")
        else:
            yield rotary.receipt(session, claim, context=end)

    @property
    def _alpha(self) -> float:
        return self.factor if self.alpha is None else self.alpha


def stretched(
    usual: torch.Tensor, tokens: torch.Tensor, trained: int, alpha: float
) -> torch.Tensor:
    """Return the frequencies of texts of `tokens` tokens, `[rows]` → `[rows, frequencies]`.

    With the base b multiplied by s ** (d / (d - 2)), b ** (-2i / d) is that of `usual` times
    s ** (-2i / (d - 2)).
    """
    import torch

    scale = 1 + alpha * (tokens / trained - 1).clamp(min=0)
    index = torch.arange(len(usual), device=usual.device)
    return usual * scale[:, None] ** (-index / (len(usual) - 1))


def _unable(context: CheckContext, shape: ModelShape) -> Iterator[Problem]:
    """Refuse a cache where its keys cannot be rotated late."""
    if "cache.none" in context.traits:
        return
    choices, slot = context.recipe.choices, "position_encoding"
    what = f"{slot}=dynamic does not run {shape.model_type} with cache={choices.get('cache')}"
    why = unsuitable(shape, by_type=True)
    if "model.attention_interface" not in shape.traits:
        why = "its code takes no attention from outside"
    if why:
        # Compiled steps would refuse cache=none in turn.
        hint = YARN if "decode.compiled" in context.traits else CACHE.hint
        yield replace(CACHE.problem(slot, f"{what}, since {why}"), hint=hint)
    elif "attention.rotation" not in context.traits:
        yield Problem(
            slot=slot,
            code="trait-missing",
            message=f"{what} and attention={choices.get('attention')}, which takes no keys that "
            "are rotated late (attention.rotation)",
            hint="attention=native",
        )
