"""heads=native: as many key/value heads as the checkpoint has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from engine import hookimpl
from engine.contexts import Heads, HeadsContext, Receipt
from engine.shape import WITHOUT_ATTENTION

if TYPE_CHECKING:
    from torch import nn

    from engine.session import Session

FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv")
OUTPUT = ("o_proj", "out_proj", "c_proj", "dense", "out")


@dataclass
class NativeHeads:
    """Leave the heads alone."""

    provides: ClassVar[tuple[str, ...]] = ("heads.unchanged",)

    @hookimpl
    def heads(self, context: HeadsContext) -> Heads:
        """Give the config back."""
        return Heads(config=context.config)

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Count heads by the rows of a real projection, and hold them against the config."""
        text = session.model.config.get_text_config()
        source = session.source_config.get_text_config()
        same = all(
            getattr(text, name, None) == getattr(source, name, None)
            for name in ("num_attention_heads", "num_key_value_heads", "num_kv_heads")
        )
        evidence: dict[str, str | int | float | bool] = {}
        decoder = cast(Any, session.model).get_decoder()
        heads = getattr(text, "num_attention_heads", 0)
        measured = _measure(decoder, heads, session.shape.layer_types)
        stated = getattr(text, "num_key_value_heads", None)
        if measured is None:
            evidence["projections"] = "of a layout that is not known here; config compared only"
        else:
            kv_heads, evidence["projection"], evidence["rows"] = measured
            kind = "MQA" if kv_heads == 1 else "GQA" if kv_heads < heads else "MHA"
            evidence |= {
                "query heads": heads,
                "kv heads": kv_heads,
                "kind": kind,
            }
            same = same and stated in (None, kv_heads)
        yield Receipt(
            slot="heads", claim="heads are the checkpoint's own", evidence=evidence, ok=same
        )


def _measure(
    decoder: nn.Module, heads: int, layer_types: tuple[str, ...]
) -> tuple[int, str, int] | None:
    """Return the kv heads of the first attention layer, the projection that tells, and its rows."""
    for name, module in decoder.named_modules():
        children = dict(module.named_children())
        output = next((children[child] for child in OUTPUT if child in children), None)
        if output is None or not heads or (_columns(output) % heads):
            continue
        number = re.search(r"\.(\d+)\.", f".{name}.")  # linear attention has heads of its own
        if number and layer_types[int(number[1])] in WITHOUT_ATTENTION:
            continue
        head_dim = _columns(output) // heads
        if "k_proj" in children:
            rows = _rows(children["k_proj"])
            return rows // head_dim, f"{name}.k_proj", rows
        fused = next((child for child in FUSED if child in children), None)
        if fused and (rows := _rows(children[fused])):
            return (rows // head_dim - heads) // 2, f"{name}.{fused}", rows
    return None


def _rows(layer: Any) -> int:
    """Return the numbers a linear layer gives: packed weights hide it, GPT-2 transposes them."""
    return int(getattr(layer, "out_features", None) or getattr(layer, "nf", None) or 0)


def _columns(layer: Any) -> int:
    """Return the numbers a linear layer takes."""
    return int(getattr(layer, "in_features", None) or getattr(layer, "nx", None) or 0)
