"""Attention that hides old tokens, whatever computes it: what `window` and `sinks` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from engine.attending.masks import seen
from engine.attending.scores import eager
from engine.contexts import Receipt
from engine.errors import Problem
from engine.families import family
from engine.rules import Rule
from engine.shape import WINDOWED, WITHOUT_KEYS

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from engine.attending.masks import Mask
    from engine.contexts import CheckContext
    from engine.session import Session

BEYOND = 8
"""Tokens that the mask of a receipt goes beyond the window."""

INTERFACE = Rule(
    code="window-own-code",
    why="transformers takes masks from outside only where the model's code looks attention up in "
    "its AttentionInterface",
    hint="attention=native",
    source="transformers, docs/source/en/attention_interface.md",
    seen="transformers 5.23.0, 2026-11-22",
)


class Windowed:
    """Forward and mask of attention to the first `sinks` and the last `window` tokens.

    Tokens are counted from the first real one, so that padding on the left changes nothing. Where
    the model hides tokens of its own accord, both count.
    """

    def __init__(self, config: PretrainedConfig, window: int, sinks: int = 0) -> None:
        self.window, self.sinks = window, sinks
        # Models that cap scores or have learned sinks have no SDPA, which can do neither.
        self.fused = "model.sdpa" in family(config.get_text_config().model_type).traits
        self._plain = eager()
        self.calls = 0
        """Of the forward, outside of compiled code."""
        self.masked = 0
        """Of these, how many got a mask over all keys."""

    def mask(self, **given: Any) -> torch.Tensor:
        """Hide what the given mask function hides, and what is old: never None."""
        from transformers.masking_utils import (
            and_masks,
            causal_mask_function,
            eager_mask,
            sdpa_mask,
        )

        make: Mask = sdpa_mask if self.fused else eager_mask
        both = and_masks(given.get("mask_function", causal_mask_function), self._seen(given))
        found: torch.Tensor = make(
            **{**given, "mask_function": both, "allow_is_causal_skip": False}
        )
        return found

    def forward(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute attention with SDPA, or in plain torch where a model has what SDPA cannot do."""
        import torch
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if not torch.compiler.is_compiling():
            self.calls += 1
            over_all = attention_mask is not None and attention_mask.shape[-1] == key.shape[-2]
            self.masked += over_all
        compute: Any = sdpa_attention_forward if self.fused else self._plain
        found: tuple[torch.Tensor, torch.Tensor | None] = compute(
            module, query, key, value, attention_mask, **options
        )
        return found

    def _seen(self, given: dict[str, Any]) -> Callable[..., torch.Tensor]:
        """Return the mask function of transformers: which query may see which key."""
        import torch

        padded = given.get("attention_mask")
        if padded is None:
            first = torch.zeros(given["batch_size"], dtype=torch.long, device=given.get("device"))
        else:
            first = (padded.cumsum(-1) == 0).sum(-1)

        def seen(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
            near: torch.Tensor = key > query - self.window
            return near | (key < first[batch] + self.sinks) if self.sinks else near

        return seen


def refuse(
    context: CheckContext, window: int, sinks: int = 0, option: str = "size"
) -> Iterator[Problem]:
    """Refuse a window that holds no token, and one that hides none."""
    name, shape = f"attention.{option}", context.reshaped
    limits = []
    if shape is not None:
        kinds = {kind for kind in shape.layer_types if kind not in WITHOUT_KEYS}
        own = shape.sliding_window if kinds and kinds <= WINDOWED else None
        limits = [(own, "window of its own"), (shape.max_positions, "context")]
    known = [(least, what) for least, what in limits if least is not None]
    usual = min([1024, *(max(1, least // 2 - sinks) for least, _ in known)])
    if window < 1:
        message = f"{name}={window}: a token must see itself, at least"
        yield Problem(slot="attention", code="value", message=message, hint=f"{name}={usual}")
        return
    for least, what in known:
        if shape is not None and window + sinks >= least:
            yield Problem(
                slot="attention",
                code="does-nothing",
                message=f"{name}={window} hides nothing: {shape.model_type} has a {what} of "
                f"{least} tokens",
                hint=f"{name}={usual}, or attention=native",
            )
            return


def receipt(session: Session) -> Receipt:
    """Prove that every attention call was masked, and count what the mask hides past the window."""
    import torch
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

    used: Any = getattr(session.built["attention"].forward, "__self__", None)
    config = session.model.config
    evidence: dict[str, str | int | float | bool] = {
        "implementation": str(config._attn_implementation)
    }
    ok = isinstance(used, Windowed)
    if ok:
        tokens = used.window + used.sinks + BEYOND
        mask = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
            batch_size=1,
            q_length=1,
            kv_length=tokens,
            q_offset=tokens - 1,
            kv_offset=0,
            mask_function=causal_mask_function,
            attention_mask=None,
            dtype=torch.float32,
            config=config,
            device=session.device,
        )
        hidden = ~seen(mask)
        evidence |= {
            "attention calls": used.calls,
            "of them masked": used.masked,
            f"keys hidden from token {tokens}": int(hidden[0, 0].sum()),
            "computed by": "SDPA" if used.fused else "plain torch",
        }
        ok = used.calls == used.masked > 0 and int(hidden[0, 0].sum()) == BEYOND
    return Receipt(
        slot="attention", claim="tokens before the window are hidden", evidence=evidence, ok=ok
    )
