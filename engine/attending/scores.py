"""Attention in plain torch, as the formula has it: softmax(scores) values.

What the plugins share that compute it themselves. Sizes are those of `engine.contexts.Attention`:
query `[batch, heads, queries, head_dim]`, key and value `[batch, kv_heads, keys, head_dim]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.attending.masks import block_of, seen
from engine.errors import Problem, RuntimeFailure

if TYPE_CHECKING:
    import torch

    from engine.contexts import Scores


def product(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return query·key, `[batch, heads, queries, keys]`; heads that share keys do not copy them."""
    batch, heads, queries, head_dim = query.shape
    kv_heads = key.shape[1]
    folded = query.reshape(batch, kv_heads, heads // kv_heads * queries, head_dim)
    return (folded @ key.transpose(-1, -2)).view(batch, heads, queries, key.shape[2])


def mixed(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return weights·value, `[batch, heads, queries, head_dim]`."""
    batch, heads, queries, keys = weights.shape
    kv_heads = value.shape[1]
    folded = weights.reshape(batch, kv_heads, heads // kv_heads * queries, keys)
    return (folded @ value).view(batch, heads, queries, value.shape[3])


@dataclass(kw_only=True)  # not frozen: torch.compile cannot make those
class Scoring:
    """How one layer makes scores of queries and keys, in one forward pass."""

    scaling: float
    softcap: float | None = None
    """Gemma 2's: scores stay within ± this, arXiv 2408.00118, section 2."""
    hook: Scores | None = None
    """A position encoding's own product, and the positions it needs."""
    query_positions: torch.Tensor | None = None
    key_positions: torch.Tensor | None = None

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        rows: slice = slice(None),
        columns: slice = slice(None),
    ) -> torch.Tensor:
        """Return scores of some queries and some keys, in float32; the lowest number where hidden.

        `mask` is the part that belongs to them, boolean or additive.
        """
        import torch

        if self.hook is None:
            scores = product(query, key)
        else:
            assert self.query_positions is not None
            assert self.key_positions is not None
            scores = self.hook(
                query,
                key.repeat_interleave(query.shape[1] // key.shape[1], dim=1),
                self.query_positions[:, rows],
                self.key_positions[:, columns],
            )
        scores = scores.float() * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is None:
            return scores
        if mask.dtype is torch.bool:
            return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores + mask


def scoring(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    hook: Scores | None,
    position_ids: torch.Tensor | None,
) -> Scoring:
    """Return how to make scores of what a layer gives to its attention function.

    Raises:
        RuntimeFailure: when positions are needed, and the model's code does not pass them on.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if hook is None:
        return Scoring(scaling=scaling, softcap=softcap)
    positions = known_positions(position_ids, query.shape[0])
    return Scoring(
        scaling=scaling,
        softcap=softcap,
        hook=hook,
        query_positions=positions,
        key_positions=key_positions(positions[:, -1], mask, query.shape[2], key.shape[2]),
    )


def known_positions(position_ids: torch.Tensor | None, rows: int) -> torch.Tensor:
    """Return the positions of the queries, `[rows, queries]`, that a model tells its attention.

    Raises:
        RuntimeFailure: when its code does not pass them on.
    """
    if position_ids is None:
        raise RuntimeFailure(
            Problem(
                message="the model's code does not tell its attention the positions of the tokens",
                hint="position_encoding=native",
                code="no-positions",
            )
        )
    return position_ids.expand(rows, -1)


def key_positions(
    newest: torch.Tensor, mask: torch.Tensor | None, queries: int, keys: int
) -> torch.Tensor:
    """Return the position of each key, `[batch, keys]`, counted from the first real token.

    The last key that the newest query sees is its own. So it holds behind padding, in a cache that
    is longer than the text, and in one that has dropped its oldest keys. Without a mask, a single
    query sees all keys, and several are the first of them: the rest of a fixed cache is empty then.
    """
    import torch

    columns = torch.arange(keys, device=newest.device)
    own = newest.new_full(newest.shape, (keys if queries == 1 else queries) - 1)
    if mask is not None:
        row = block_of(mask, slice(queries - 1, queries), slice(None))[:, 0, 0]
        own = torch.where(seen(row), columns, -1).amax(-1).expand_as(newest)
    return columns - own[:, None] + newest[:, None]


def true_positions(attention_mask: torch.Tensor, queries: int) -> torch.Tensor:
    """Return the positions of the last `queries` tokens, `[batch, queries]`, padding not counted.

    `attention_mask` is `[batch, tokens]`, 0 where padded.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -queries:]


def eager(hook: Scores | None = None) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return attention with all scores in memory, for every model of the attention interface.

    Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1; with a cap of scores (Gemma 2) and with
    learned sinks (gpt-oss), where the model has them.
    """

    def forward(
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        score = scoring(query, key, attention_mask, scaling, softcap, hook, position_ids)
        scores = score(query, key, attention_mask)
        if s_aux is not None:  # takes its share of each row, and has no value
            sinks = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
        return mixed(weights, value).transpose(1, 2).contiguous(), weights

    return forward
