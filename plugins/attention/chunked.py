"""attention=chunked: exact attention, block by block, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

from engine import hookimpl
from engine.attending import costs
from engine.attending.masks import block_of, by_blocks, seen
from engine.attending.scores import mixed, scoring
from engine.contexts import (
    Attention,
    AttentionContext,
    CheckContext,
    EstimateContext,
    Receipt,
    Term,
)
from engine.errors import Problem

if TYPE_CHECKING:
    import torch

    from engine.contexts import Scores
    from engine.session import Session


OPERATORS = 17
"""Of a block."""

LEAST = -87.0
"""Whose exponential is about the smallest normal number of float32: of less, as of what is hidden,
Intel's library takes eight times as long (torch 2.13.0 on a CPU, 2026-11-26)."""


@dataclass
class Chunked:
    """Compute exact attention block by block: memory grows with the length, not with its square.

    Rabe & Staats 2021, arXiv 2112.05682, section 2; Dao et al. 2022 (FlashAttention), arXiv
    2205.14135, section 3.1; the guide's section 2. Scores of `query_block` queries and `key_block`
    keys exist at a time, with the running maximum and sum of each row's softmax. Masks and position
    biases are made by blocks, too, and blocks in which all is hidden are skipped. Plain operators:
    it runs everywhere, and is slower than a fused kernel.
    """

    query_block: int = 256
    key_block: int = 1024
    provides: ClassVar[tuple[str, ...]] = (
        "attention.bias",
        "attention.rotation",
        "attention.scores",
    )
    needs: ClassVar[dict[str, str]] = {"model.attention_interface": "attention=native"}

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse blocks that are none."""
        for name, usual in (("query_block", 256), ("key_block", 1024)):
            if getattr(self, name) < 1:
                yield Problem(
                    slot="attention",
                    code="value",
                    message=f"attention.{name}={getattr(self, name)}: a block has 1 token or more",
                    hint=f"attention.{name}={usual}",
                )

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price the scores of one block, their exponentials and these in the model's format."""
        rows, columns = min(self.query_block, context.new), min(self.key_block, context.met)
        scores = context.batch * context.shape.heads * rows * columns
        blocks = ceil(context.new / rows) * ceil(context.met / columns)
        yield Term(
            name="a block of scores",
            bytes=3 * scores * 4,
            during="attention",
            launches=OPERATORS * blocks * context.shape.layers,
            moved=costs.SCORE_PASSES * scores * 4 * blocks * context.shape.layers,
        )
        yield from costs.fused(context)

    @hookimpl
    def attention(self, context: AttentionContext) -> Attention:
        """Give the loop over blocks, and masks that are made by blocks."""
        forward = BlockAttention(self.query_block, self.key_block, context.scores)
        return Attention(forward=forward, mask=by_blocks(self.query_block))

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count the blocks, name the largest, and show that no fused kernel ran."""
        forward: BlockAttention = session.built["attention"].forward
        operators = session.probe.operators
        fused = session.probe.calls("scaled_dot_product")
        passes = len(session.probe.tokens)
        rows, columns = forward.largest
        yield Receipt(
            slot="attention",
            claim="attention is computed block by block",
            evidence={
                "calls in the probe": session.probe.attention_calls,
                "forward passes of the probe": passes,
                "blocks computed": forward.computed,
                "blocks skipped, all hidden": forward.skipped,
                "largest block of scores": f"{rows} queries x {columns} keys",
                "softmax operators": operators["aten::softmax"] + operators["aten::_softmax"],
                "exponential operators": operators["aten::exp"],
                "fused attention operators": fused,
            },
            ok=forward.computed >= session.probe.attention_calls >= passes > 0
            and operators["aten::exp"] >= session.probe.attention_calls
            and 0 < rows <= self.query_block
            and 0 < columns <= self.key_block
            and fused == 0,
        )


class BlockAttention:
    """Attention as a loop over blocks, and what it counted outside of compiled code."""

    def __init__(self, query_block: int, key_block: int, hook: Scores | None = None) -> None:
        self.computed = 0
        self.skipped = 0
        self.largest = (0, 0)
        self._sizes = query_block, key_block
        self._hook = hook

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Return `[batch, queries, heads, head_dim]`; for each query, with m and l running,

            m' = max(m, max s),  w = exp(s - m'),  l' = l exp(m - m') + sum w,
            o' = o exp(m - m') + w v;  at the end o / l.

        A sliding window is in the mask already.
        """  # fmt: skip
        import torch

        # Compiled code neither branches by what a mask holds, nor counts.
        counting = not torch.compiler.is_compiling()
        batch, heads, queries, _d = query.shape
        score = scoring(query, key, attention_mask, scaling, softcap, self._hook, position_ids)
        result = value.new_empty(batch, queries, heads, value.shape[3])
        for rows in _blocks(queries, self._sizes[0]):
            some = query[:, :, rows]
            shape = (*some.shape[:3], 1)
            if s_aux is None:
                lowest = torch.finfo(torch.float32).min
                highest = some.new_full(shape, lowest, dtype=torch.float32)
                total = torch.zeros_like(highest)
            else:  # a learned sink is a score without a value: the sum begins with it
                highest = s_aux.float().view(1, -1, 1, 1).expand(shape)
                total = torch.ones_like(highest)
            output = some.new_zeros((*shape[:3], value.shape[3]), dtype=torch.float32)
            for columns in _blocks(key.shape[2], self._sizes[1]):
                mask = attention_mask
                if mask is not None:
                    mask = block_of(mask, rows, columns)
                    if counting and not seen(mask).any():
                        self.skipped += 1
                        continue
                scores = score(some, key[:, :, columns], mask, rows, columns)
                if counting:
                    self.computed += 1
                    self.largest = max(self.largest, (scores.shape[2], scores.shape[3]))
                before, highest = highest, torch.maximum(highest, scores.amax(-1, keepdim=True))
                weights = (scores - highest).clamp_(min=LEAST).exp_()
                faded = (before - highest).exp()
                total = total * faded + weights.sum(-1, keepdim=True)
                output = output * faded + mixed(weights.to(value.dtype), value[:, :, columns])
            # A row of padding may have seen nothing at all: it becomes 0, not NaN.
            output = output / total.clamp(min=torch.finfo(torch.float32).tiny)
            result[:, rows] = output.transpose(1, 2)
        return result, None


def _blocks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
