"""cache=quantized: keys and values in 4 or 8 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
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

if TYPE_CHECKING:
    import torch

    from engine.session import Session

    Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class IntegerLayer(Layer):
    """Keep blocks of `group_size` tokens as codes, and the last tokens as they came.

    Codes `[batch, blocks, heads, group_size, size]` (at 4 bits two tokens share a byte), scale and
    zero `[batch, blocks, heads, 1, size]` of keys and `[batch, blocks, group_size, groups]` of
    values; the last tokens `[batch, heads, tokens, size]`.
    """

    def __init__(self, bits: int, group_size: int, residual: int) -> None:
        super().__init__()
        self.bits, self.group_size, self.residual = bits, group_size, residual

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new keys and values; give them as they came, and blocks as they are kept."""
        import torch

        if not self.parts:
            self.parts = {"keys": keys[:, :, :0], "values": values[:, :, :0]}
        new, self.dtype = {"keys": keys, "values": values}, keys.dtype
        last = {name: torch.cat([self.parts[name], new[name]], -2) for name in new}
        found = [torch.cat([self._blocks(name), last[name]], -2) for name in new]
        self.seen += keys.shape[-2]
        tokens = last["keys"].shape[-2]
        full = max(0, tokens - self.residual) // self.group_size * self.group_size
        for name, part in last.items():
            if full:
                self._pack(name, part[:, :, :full])
                part = part[:, :, full:].clone()  # a view would keep the memory of the whole
            self.parts[name] = part
        return found[0], found[1]

    @property
    def packed(self) -> int:
        """Return how many tokens are kept as codes."""
        codes = self.parts.get("keys codes")
        return 0 if codes is None else codes.shape[1] * self.group_size

    @property
    def plain_bytes(self) -> int:
        """Return what the kept tokens would take in the model's own number format."""
        last = [self.parts[name] for name in ("keys", "values") if self.parts]
        per_token = sum(
            part.shape[0] * part.shape[1] * part.shape[3] * part.itemsize for part in last
        )
        return per_token * self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; a block that is cut gives back what is left of it."""
        import torch

        self.seen -= abs(tokens_to_remove)
        blocks = self.seen // self.group_size if self.seen < self.packed else None
        for name in ("keys", "values"):
            last = self.parts[name]
            if blocks is None:
                self.parts[name] = last[:, :, : self.seen - self.packed]
                continue
            cut = self._blocks(name)[:, :, blocks * self.group_size : self.seen]
            self.parts[name] = torch.cat([cut, last[:, :, :0]], -2)
        if blocks is not None:
            for name in [name for name in self.parts if " " in name]:
                self.parts[name] = self.parts[name][:, :blocks]

    def _pack(self, name: str, part: torch.Tensor) -> None:
        import torch

        batch, heads, tokens, size = part.shape
        blocks = part.reshape(batch, heads, tokens // self.group_size, self.group_size, size)
        blocks = blocks.transpose(1, 2)
        codes, *rest = _quantized(blocks, self.bits, 3) if name == "keys" else self._rows(blocks)
        if self.bits == 4:
            codes = codes[..., 0::2, :] | codes[..., 1::2, :] << 4
        for kind, made in zip(("codes", "scale", "zero"), (codes, *rest), strict=True):
            before = self.parts.get(f"{name} {kind}")
            self.parts[f"{name} {kind}"] = made if before is None else torch.cat([before, made], 1)

    def _rows(self, blocks: torch.Tensor) -> Codes:
        """Quantize `[batch, blocks, heads, tokens, size]` in groups of a token's channels."""
        rows = self._to_rows(blocks)
        codes, scale, zero = _quantized(rows, self.bits, -1)
        return self._from_rows(codes, blocks.shape[2]), scale[..., 0], zero[..., 0]

    def _to_rows(self, blocks: torch.Tensor) -> torch.Tensor:
        rows = blocks.transpose(2, 3).flatten(3)
        group = math.gcd(self.group_size, rows.shape[3])
        return rows.reshape(*rows.shape[:3], rows.shape[3] // group, group)

    def _from_rows(self, rows: torch.Tensor, heads: int) -> torch.Tensor:
        size = rows.shape[3] * rows.shape[4] // heads
        return rows.reshape(*rows.shape[:3], heads, size).transpose(2, 3)

    def _blocks(self, name: str) -> torch.Tensor:
        """Return the blocks as numbers `[batch, heads, tokens, size]`."""
        import torch

        last = self.parts[name]
        codes = self.parts.get(f"{name} codes")
        if codes is None:
            return last[:, :, :0]
        scale, zero = self.parts[f"{name} scale"], self.parts[f"{name} zero"]
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], 4).flatten(3, 4)
        if name == "keys":
            numbers = codes * scale + zero
        else:
            rows = self._to_rows(codes) * scale[..., None] + zero[..., None]
            numbers = self._from_rows(rows, codes.shape[2])
        return numbers.transpose(1, 2).flatten(2, 3).to(last.dtype)


def _quantized(part: torch.Tensor, bits: int, dim: int) -> Codes:
    """Return codes, scale and zero of groups along `dim`: `codes * scale + zero` is `part`."""
    import torch

    zero = part.amin(dim, keepdim=True)
    scale = (part.amax(dim, keepdim=True) - zero) / (2**bits - 1)
    scale = scale.clamp(min=torch.finfo(part.dtype).tiny)
    codes = ((part - zero).float() / scale.float()).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, zero


@dataclass
class Quantized:
    """Keep keys and values in `bits` (4 or 8), keys by channel and values by token, as KIVI does.

    Liu et al. 2024, arXiv 2402.02750, section 3: `group_size` tokens share a scale and a zero for
    each channel of their keys, and so do up to `group_size` channels of a token's values, because
    keys have outliers in a few channels and values have not. The last `residual` tokens stay as
    they came. Scales are in the model's number format. Each step converts all back, which costs
    time. A prompt sees itself unrounded, a later turn sees it rounded. On the tiny random models
    of the tests, which are far touchier than trained ones, the logits are off by up to 0.04 in 8
    bits and 0.3 in 4 (norm of the difference over the norm; groups of 16, at most 23 of 60 tokens
    unrounded). Layers with a window of their own keep it as it is.
    """

    bits: int = 4
    group_size: int = 32
    residual: int = 128
    provides: ClassVar[tuple[str, ...]] = ("cache.quantized", "cache.croppable")

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse numbers that cannot be packed, and models none of whose layers would be."""
        for name, ok, why, hint in (
            ("bits", self.bits in (4, 8), "must be 4 or 8", 4),
            (
                "group_size",
                self.group_size >= 8 and self.group_size % 8 == 0,
                "must be a multiple of 8: scales of smaller groups take more than they save",
                32,
            ),
            ("residual", self.residual >= 0, "must be 0 or more", 128),
        ):
            if not ok:
                message = f"cache.{name}={getattr(self, name)} {why}"
                yield Problem(
                    slot="cache", code="value", message=message, hint=f"cache.{name}={hint}"
                )
        yield from refuse_without_full(context, "quantized", "packs keys and values in")

    @hookimpl
    def estimate(self, context: EstimateContext) -> Iterator[Term]:
        """Price codes, scales and zeros of full groups, and the tokens that stay as they are."""
        group, size, shape = self.group_size, context.value_bytes, context.shape
        # What takes the place of values in a latent cache is the rotated part of the keys.
        latent, kept = "model.latent_kv" in shape.traits, 0
        for kind, values, tokens in layers_kept(shape, context.tokens):
            blocks = max(0, tokens - self.residual) // group if kind == FULL else 0
            channels = shape.rotary_dim if latent else values // 2
            groups = channels // math.gcd(group, channels) if channels else 0
            kept += (tokens - blocks * group) * values * size
            kept += blocks * (
                group * values * self.bits // 8 + 2 * size * (values - channels + group * groups)
            )
        yield from unpacking(context, context.batch * kept)

    @hookimpl
    def cache(self, context: CacheContext) -> KeyValues:
        """Give an empty cache."""
        make = partial(IntegerLayer, self.bits, self.group_size, self.residual)
        return KeyValues(cache=cache_of(context.config, make))

    @hookimpl
    def receipts(self, session: Session) -> Iterator[Receipt]:
        """Measure what the probe left, and what a longer text like it takes."""
        claim = f"keys and values are kept in {self.bits} bits"
        tokens = self.residual + self.group_size
        yield prove_packed(session, claim, IntegerLayer, tokens, **vars(self))
