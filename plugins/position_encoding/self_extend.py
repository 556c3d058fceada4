"""position_encoding=self-extend: a longer context from the positions that a model knows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from engine import hookimpl
from engine.attending.scores import true_positions
from engine.contexts import (
    CheckContext,
    PositionContext,
    PositionEncoding,
    PrepareContext,
    Receipt,
    ReshapeContext,
)
from engine.errors import Problem
from engine.families import family
from engine.positions.late_rope import rotary_embedding, rotate, still_turning, unrotated
from engine.positions.rotary import context_of, outside
from engine.rules import Rule

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from engine.session import Session
    from engine.shape import ModelShape

SIGNATURE = (
    r"def apply_rotary_pos_emb\(\s*q(: torch\.Tensor)?, k(: torch\.Tensor)?, "
    r"cos(: torch\.Tensor)?, sin(: torch\.Tensor)?, unsqueeze_dim"
)
CONDITIONAL = r"\n( +)if [^\n]*:\n(?:\1    [^\n]*\n){0,4}?\1    [^\n]*apply_rotary"
NORM_AFTER = (
    r"= apply_rotary_pos_emb\((?:(?!ALL_ATTENTION_FUNCTIONS|\n    def )[\s\S])*?"
    r"self\.\w*norm\w*\("
)


@dataclass
class SelfExtend:
    """Give tokens `window` and more apart positions in groups of `group_size`, untrained.

    Jin et al. 2024 (Self-Extend), arXiv 2401.01325, section 3 and algorithm 1: nearer tokens keep
    their exact distance, farther ones get p // group_size, shifted to continue where the window
    ends. No position exceeds those that the model knows, and its context becomes
    (context - window) * group_size + window tokens. Keys are cached unrotated and turned again for
    each new token, twice: that is the price.
    """

    group_size: int = 4
    window: int = 1024
    provides: ClassVar[tuple[str, ...]] = ("position.scores",)
    needs: ClassVar[dict[str, str]] = {
        "model.rope": "position_encoding=native",
        "model.attention_interface": "position_encoding=native",
        "attention.scores": "attention=chunked",
    }
    excludes: ClassVar[dict[str, Rule]] = {
        "cache.evicting": Rule(
            code="self-extend-evicting-cache",
            why="masks know one offset for all keys, so behind a gap the positions of those "
            "before it are not to be told",
            hint="cache=dynamic",
            source="transformers/cache_utils.py, CacheLayerMixin.get_mask_sizes",
            seen="transformers 5.23.0, 2026-11-22",
        ),
    }

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse numbers out of range, and models whose layers do not all rotate alike."""
        shape = context.shape
        limit = shape.max_positions if shape else None
        grouping, left = self.group_size >= 2, limit is None or self.window < limit
        none_left = f"leaves nothing of the model's context of {limit} tokens to group"
        yield from outside(
            self,
            ("group_size", grouping, "must be 2 or more, or nothing is grouped", "4"),
            ("window", self.window >= 1, "must be 1 or more", f"{(limit or 2048) // 2}"),
            ("window", left, none_left, f"{max((limit or 2) // 2, 1)}"),
        )
        if shape is not None and "model.rope" in shape.traits and (why := _unsuitable(shape)):
            yield Problem(
                slot="position_encoding",
                code="position-unsupported",
                message=f"position_encoding=self-extend does not run {shape.model_type}: {why}",
                hint="position_encoding=native",
            )

    @hookimpl
    def reshape(self, context: ReshapeContext) -> ModelShape | None:
        """Make the context longer."""
        limit = context.shape.max_positions
        if limit is None or self.group_size < 2 or not 0 < self.window < limit:
            return None
        return replace(context.shape, max_positions=self._reach(limit))

    @hookimpl
    def position_encoding(self, context: PositionContext) -> PositionEncoding:
        """Take rotation out of the model, and put it into the scores."""
        config = unrotated(context.config)
        text = config.get_text_config()
        text.max_position_embeddings = self._reach(context_of(context.config))
        scores = GroupedScores(context.config, self.group_size, self.window)
        return PositionEncoding(config=config, scores=scores)

    @hookimpl
    def prepare(self, context: PrepareContext) -> PreTrainedModel:
        """Number the tokens behind the padding from 0, where the decoder does not."""
        context.model.register_forward_pre_hook(_number, with_kwargs=True)
        return context.model

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Read what still rotates in the model, what the scores counted, and how far they reach."""
        scores: GroupedScores = session.built["position_encoding"].scores
        still = still_turning(session.model)
        before, after = map(context_of, (session.source_config, session.model.config))
        distance = scores.largest_distance(after)
        yield Receipt(
            slot="position_encoding",
            claim="far tokens share positions that the model knows",
            evidence={
                "frequencies that rotate keys before they are cached": still,
                "frequencies of the scores": scores.frequencies,
                "calls": scores.calls,
                "pairs of tokens in the window": int(scores.near),
                "pairs of tokens grouped": int(scores.far),
                "context before": before,
                "context after": after,
                "largest distance in it": distance,
            },
            ok=still == 0
            and scores.calls > 0
            and int(scores.near) > 0
            and distance < before < after,
        )

    def _reach(self, limit: int) -> int:
        # The paper's formula where the window is a multiple of the group; else a little less,
        # since the shift is rounded: the last position is limit - 1, and never more.
        return (limit - self.window + self.window // self.group_size) * self.group_size


class GroupedScores:
    """Products of queries and keys by algorithm 1, and counts, outside of compiled code."""

    def __init__(self, config: PretrainedConfig, group_size: int, window: int) -> None:
        self.calls = 0
        self.near: Any = 0
        self.far: Any = 0
        self._rotary = rotary_embedding(config)
        self.frequencies = int(self._rotary.inv_freq.count_nonzero())
        self._turn = rotate(config, 2 * len(self._rotary.inv_freq))
        self._group, self._window = group_size, window

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        query_positions: torch.Tensor,
        key_positions: torch.Tensor,
    ) -> torch.Tensor:
        """Return `[batch, heads, queries, keys]`, as `engine.contexts.Scores`."""
        import torch

        self._rotary.to(query.device)
        near = self._turned(query, query_positions) @ self._turned(key, key_positions).mT
        grouped = self._turned(query, self._grouped(query_positions))
        far = grouped @ self._turned(key, key_positions // self._group).mT
        distance = query_positions[:, :, None] - key_positions[:, None, :]
        is_far = distance >= self._window
        if not torch.compiler.is_compiling():
            self.calls += 1
            self.far = self.far + is_far.sum()
            self.near = self.near + ((distance >= 0) & ~is_far).sum()
        return torch.where(is_far[:, None], far, near)

    def largest_distance(self, context: int) -> int:
        """Return how far apart the last and the first of `context` tokens are for the model."""
        import torch

        last = int(self._grouped(torch.tensor(context - 1)))
        return max(last, self._window - 1)

    def _grouped(self, query_positions: torch.Tensor) -> torch.Tensor:
        return query_positions // self._group + self._window - self._window // self._group

    def _turned(self, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._turn(states, *self._rotary(states, positions))


def _number(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    ids: Any = args[0] if args else kwargs.get("input_ids")
    mask: Any = kwargs.get("attention_mask")
    if getattr(mask, "ndim", 0) != 2 or ids is None or kwargs.get("position_ids") is not None:
        return args, kwargs
    return args, {**kwargs, "position_ids": true_positions(mask, ids.shape[1])}


def _unsuitable(shape: ModelShape) -> str:
    """Return why the scores cannot be made outside of a model's code; '' where they can."""
    code = family(shape.model_type).model_code
    if any(isinstance(kind, Mapping) for kind in shape.rope_parameters.values()):
        return "its types of layers rotate differently, and scores do not know their layer"
    if shape.rope_type in ("dynamic", "longrope"):
        return f"its frequencies ({shape.rope_type}) change with the length of the text"
    if re.search(CONDITIONAL, code):
        return "not all of its layers rotate, and scores do not know their layer"
    if re.search(NORM_AFTER, code):
        return "it normalizes queries and keys after rotating them, so they cannot be turned later"
    if not re.search(SIGNATURE, code):
        return "it rotates by code of its own kind"
    return ""
