"""cache=fp8: keys and values in 8-bit floating point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from engine import hookimpl
from engine.caching.layers import (
    FULL,
    Layer,
    cache_of,
    layers_kept,
    refuse_without_full,
    unpacking,
)
from engine.caching.measuring import prove_packed
from engine.contexts import CacheContext, CheckContext, EstimateContext, KeyValues, Receipt, Term
from engine.errors import Problem
from engine.rules import Rule

if TYPE_CHECKING:
    import torch

    from engine.session import Session

SCALES = 2
"""Of each token, in each layer: one for its keys, one for its values."""
SCALE_BYTES = 4
KEY_BIAS = Rule(
    code="fp8-key-bias",
    why="3 bits of mantissa leave little of keys that a large bias moves far from zero; with "
    "trained ones, as of Qwen2.5, answers have become garbage",
    hint="cache=quantized cache.bits=8, which keeps keys by channel",
    source="verl-project/verl#4435, NVIDIA/TensorRT-LLM#4218",
    seen="torch 2.13.0, 2026-11-22",
)


class Float8Layer(Layer):
    """Keep keys and values as E4M3 codes, and a scale for each token."""

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys and values; give all as they are kept, so that no pass sees better ones."""
        import torch

        for name, new in (("keys", keys), ("values", values)):
            codes, scale = _packed(new)
            if name in self.parts:
                codes = torch.cat([self.parts[name], codes], -2)
                scale = torch.cat([self.parts[f"{name} scale"], scale], -2)
            self.parts |= {name: codes, f"{name} scale": scale}
        self.seen, self.dtype = self.seen + keys.shape[-2], keys.dtype
        return self._unpacked("keys"), self._unpacked("values")

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens."""
        self.seen -= abs(tokens_to_remove)
        self.parts = {name: part[:, :, : self.seen] for name, part in self.parts.items()}

    @property
    def plain_bytes(self) -> int:
        """Return what the kept tokens would take in the model's own number format."""
        codes = sum(self.parts[name].numel() for name in ("keys", "values") if self.parts)
        return codes * self.dtype.itemsize if self.dtype is not None else 0

    def _unpacked(self, name: str) -> torch.Tensor:
        import torch

        codes = self.parts[name].view(torch.float8_e4m3fn).to(torch.float32)
        return (codes * self.parts[f"{name} scale"]).to(self.dtype)


def _packed(new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes as bytes, which all devices can sort and repeat, and scales per token."""
    import torch

    most = torch.finfo(torch.float8_e4m3fn).max
    scale = new.abs().amax((1, 3), keepdim=True).float() / most
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return (new.float() / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale


@dataclass
class Float8:
    """Keep keys and values in 8-bit floating point (E4M3), with a scale for each token.

    The format: Micikevicius et al. 2022, arXiv 2209.05433, section 3. Half the memory of bfloat16;
    each step converts all back, which costs time. Every token is rounded once, when it is written,
    and no pass sees it otherwise: prompts in pieces, turns and drafts give what one pass gives. On
    the tiny random models of the tests, which are far touchier than trained ones, the logits are
    off by up to 0.2 (norm of the difference over the norm). Qwen2 and Qwen2.5, some channels of
    whose keys are huge, are reported to suffer most (vllm-project/vllm#10411,
    verl-project/verl#4435). Layers with a window of their own keep it unrounded.
    """

    provides: ClassVar[tuple[str, ...]] = ("cache.quantized", "cache.croppable")
    alarms: ClassVar[dict[str, Rule]] = {"model.key_bias": KEY_BIAS}
    excludes: ClassVar[dict[str, str]] = {
        "target.mps": "cache=quantized: the GPU of a Mac has no 8-bit floating point"
    }

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse models none of whose layers would be rounded."""
        yield from refuse_without_full(context, "fp8", "rounds keys and values in")

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price a byte for each number and two scales for each token."""
        kept = sum(
            tokens
            * (values + SCALES * SCALE_BYTES if kind == FULL else values * context.value_bytes)
            for kind, values, tokens in layers_kept(context.shape, context.tokens)
        )
        yield from unpacking(context, context.batch * kept)

    @hookimpl
    def cache(self, context: CacheContext) -> KeyValues:
        """Give an empty cache."""
        return KeyValues(cache=cache_of(context.config, Float8Layer))

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Measure what the probe left in the cache."""
        yield prove_packed(session, "keys and values are kept in 8-bit floating point", Float8Layer)
