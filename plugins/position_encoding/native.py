"""position_encoding=native: positions as the checkpoint has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from engine import hookimpl
from engine.contexts import PositionContext, PositionEncoding, Receipt

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from engine.session import Session


@dataclass
class NativePositions:
    """Leave the position encoding alone."""

    provides: ClassVar[tuple[str, ...]] = ("position_encoding.unchanged",)

    @hookimpl
    def position_encoding(self, context: PositionContext) -> PositionEncoding:
        """Give the config back."""
        return PositionEncoding(config=context.config)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Compare the model's real frequencies with those that its checkpoint's config makes."""
        text = session.model.config.get_text_config()
        source = session.source_config.get_text_config()
        changed, total = _changed(session.model, source)
        same = all(
            getattr(text, name, None) == getattr(source, name, None)
            for name in ("rope_parameters", "max_position_embeddings", "alibi")
        )
        yield Receipt(
            slot="position_encoding",
            claim="positions are encoded as the checkpoint says",
            evidence={
                "inverse frequencies": total,
                "of them changed": changed,
                "context": int(getattr(text, "max_position_embeddings", None) or 0),
            },
            ok=same and changed == 0,
        )


def _changed(model: PreTrainedModel, source: PretrainedConfig) -> tuple[int, int]:
    """Return how many inverse frequencies differ from those of the source, and of how many."""
    import torch

    decoder = cast(Any, model).get_decoder()
    rotary: Any = next((module for module in decoder.modules() if _frequencies(module)), None)
    if rotary is None:
        return 0, 0
    with torch.device("cpu"):
        fresh = _frequencies(type(rotary)(config=source))
    real = _frequencies(rotary)
    # Not bit by bit: a GPU's power function differs from a CPU's in the last place.
    close = [torch.isclose(real[name].cpu(), fresh[name], rtol=1e-5, atol=0) for name in fresh]
    return sum(int((~each).sum()) for each in close), sum(each.numel() for each in close)


def _frequencies(module: nn.Module) -> dict[str, Tensor]:
    """Return the inverse frequencies that a rotary embedding works with, by buffer."""
    return {
        name: buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    }
