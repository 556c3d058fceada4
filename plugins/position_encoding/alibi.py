"""position_encoding=alibi: distances as a penalty on the scores, and no other positions."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from engine import hookimpl
from engine.contexts import CheckContext, PositionContext, PositionEncoding, Receipt, ReshapeContext
from engine.errors import Problem
from engine.loading import places
from engine.loading.rewriting import rewriting
from engine.positions.late_rope import still_turning, unrotated

if TYPE_CHECKING:
    import torch

    from engine.session import Session
    from engine.shape import ModelShape

TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
"""What families call their table of learned positions."""


@dataclass
class Alibi:
    """Lower the score of each pair of tokens by its distance times a slope of the head's own.

    Press et al. 2022 (ALiBi), arXiv 2108.12409, section 3; the guide's section 3.1. The positions
    of the checkpoint are taken out: rotation is left away, a learned table is filled with zeros.
    Rotary models lose their limit of tokens; a table keeps its own, since each token is still
    looked up in it. A model that was not trained with ALiBi, as those are not that this works
    with, knows nothing of it: to train further, to compare, not to get good text at once.
    """

    provides: ClassVar[tuple[str, ...]] = ("position.bias",)
    needs: ClassVar[dict[str, str]] = {
        "model.attention_interface": "position_encoding=native",
        "attention.bias": "attention=chunked",
    }
    excludes: ClassVar[dict[str, str]] = {"model.alibi": "position_encoding=native"}

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse models whose positions cannot be taken out."""
        shape = context.shape
        if shape is None or "model.alibi" in shape.traits:
            return
        if shape.position == "rope" and "model.rope" not in shape.traits:
            why = "its code rotates without transformers' rope types, which could leave it away"
        elif shape.position == "sinusoidal":
            why = "its table of sinusoids is made in code, and not in the weights"
        elif shape.position == "learned" and not _tables(shape.tensors) and shape.tensors:
            why = f"its table of positions has none of the names {', '.join(TABLES)}"
        elif shape.position == "learned" and "load.random" in context.traits:
            why = "made up weights pass no conversion that could empty its table of positions"
        else:
            return
        yield Problem(
            slot="position_encoding",
            code="position-unsupported",
            message=f"position_encoding=alibi does not run {shape.model_type}: {why}",
            hint="position_encoding=native",
        )

    @hookimpl
    def reshape(self, context: ReshapeContext) -> ModelShape | None:
        """Take the limit of tokens away, where no table keeps one."""
        if context.shape.position != "rope":
            return None
        return replace(context.shape, max_positions=None)

    @hookimpl
    def position_encoding(self, context: PositionContext) -> PositionEncoding:
        """Take the checkpoint's positions out, and give the bias."""
        text = context.config.get_text_config()
        bias = LinearBias(slopes(text.num_attention_heads))
        if getattr(text, "rope_parameters", None):
            return PositionEncoding(config=unrotated(context.config), bias=bias)
        config = copy.deepcopy(context.config)
        tables = [f"{name}.weight" for name in TABLES]
        emptied = rewriting(tables, lambda tensor, _: tensor.new_zeros(tensor.shape))
        return PositionEncoding(config=config, bias=bias, converters=emptied)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Read the penalties that the masks got, and what is left of the former positions."""
        bias: LinearBias = session.built["position_encoding"].bias
        model = session.model
        held = dict(model.named_parameters())
        tables = [places.real(model, name, held[name]) for name in _tables(held)]
        left = still_turning(model) + sum(int(each.count_nonzero()) for each in tables)
        penalties = bias.penalties.tolist() if bias.penalties is not None else []
        distance = int(bias.distance)
        exact = len(penalties) == len(bias.slopes) and all(
            abs(penalty + slope * distance) <= 1e-6 * distance
            for penalty, slope in zip(penalties, bias.slopes, strict=True)
        )
        yield Receipt(
            slot="position_encoding",
            claim="scores fall with the distance, by a slope for each head, and by nothing else",
            evidence={
                "heads": len(bias.slopes),
                "steepest slope": max(bias.slopes),
                "flattest slope": min(bias.slopes),
                "masks biased": bias.calls,
                "distance of the last pair": distance,
                "penalties there": ", ".join(f"{each:.4g}" for each in penalties[:8]),
                "numbers left of the former positions": left,
            },
            ok=exact and bias.calls > 0 and distance > 0 and left == 0,
        )


class LinearBias:
    """The bias of the scores, as `engine.contexts.Bias`, and the largest that it gave."""

    def __init__(self, slopes: Sequence[float]) -> None:
        self.slopes = tuple(slopes)
        self.calls = 0
        self.distance: Any = 0
        """The largest between a last query and a first key that were asked for."""
        self.penalties: torch.Tensor | None = None
        """What that cost, `[heads]`."""

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return minus the distance times the slope, `[1, heads, queries, keys]`."""
        import torch

        slope = torch.tensor(self.slopes, device=keys.device)[None, :, None, None]
        # From each query on, not from the first token: small numbers near it keep their precision.
        found = slope * (keys[None, :] - queries[:, None])
        corner = found[0, :, -1, 0]
        if not torch.compiler.is_compiling():
            self.calls += 1
            # As tensors: reading them would make a GPU wait.
            self.distance = (queries[-1] - keys[0]).clamp(min=self.distance)
            self.penalties = corner.clamp(max=0 if self.penalties is None else self.penalties)
        return found


def slopes(heads: int) -> list[float]:
    """Return the geometric sequence of the paper's section 3, and its authors' for other numbers.

    For a power of 2 it starts at 2^(-8/heads), with that ratio. Otherwise it is that of the power
    below, and every second one of the power above until there are enough.
    """
    power = 1 << (heads.bit_length() - 1)
    found = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    return found + [2 ** (-4 * (2 * each + 1) / power) for each in range(heads - power)]


def _tables(names: Any) -> list[str]:
    ends = tuple(f"{name}.weight" for name in TABLES)
    return [name for name in names if name.endswith(ends)]
