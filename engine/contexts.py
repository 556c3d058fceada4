"""What hooks get and what they give: one typed, frozen dataclass each.

Frozen and one per hook, so that a new field breaks no plugin. In the order of a run, as in
`hookspecs.py`. Names ending in `Context` go in; the others come out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.core_model_loading import WeightConverter
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from engine.recipe import Recipe
    from engine.session import Session
    from engine.shape import ModelShape
    from engine.target import Target


@dataclass(frozen=True, kw_only=True)
class ReshapeContext:
    """A model's shape, as the choices before this one leave it."""

    recipe: Recipe
    shape: ModelShape


@dataclass(frozen=True, kw_only=True)
class CheckContext:
    """What is known before anything loads, and without torch."""

    recipe: Recipe
    shape: ModelShape | None
    """As the checkpoint has it; None when its config.json is not on this machine yet."""
    reshaped: ModelShape | None
    """As the chosen plugins will leave it: their context, their key/value heads."""
    target: Target
    traits: frozenset[str]
    """Everything that the chosen plugins, the model and the target provide."""

    @property
    def dtype(self) -> str | None:
        """Return the number format that the model computes in; None where that is not known."""
        return _dtype(self.recipe, self.shape, self.target)


@dataclass(frozen=True, kw_only=True)
class EstimateContext:
    """A pass through the model, to be priced: that of a prompt, or that of one more token."""

    recipe: Recipe
    shape: ModelShape
    """As the chosen plugins will leave it."""
    target: Target
    batch: int
    """Sequences that go through the model together; beams count."""
    tokens: int
    """Tokens of each sequence that the cache has taken when the pass is over."""
    new: int = 1
    """Tokens of each sequence that go through the model in this pass."""
    max_tokens: int | None = None
    """Tokens that each sequence may grow to, prompt and answer; None for `tokens`."""

    @property
    def dtype(self) -> str | None:
        """Return the number format that the model computes in."""
        return _dtype(self.recipe, self.shape, self.target)

    @property
    def value_bytes(self) -> int:
        """Return the bytes of a number in that format."""
        return VALUE_BYTES.get(self.dtype or "float32", 4)

    @property
    def rows(self) -> int:
        """Return how many tokens go through the model in this pass, of all sequences together."""
        return self.batch * self.new

    @property
    def capacity(self) -> int:
        """Return the tokens that each sequence may grow to."""
        return self.max_tokens or self.tokens

    @property
    def met(self) -> int:
        """Return how many keys a query meets: a full cache of fixed size, or what is kept."""
        cache: Any = getattr(self.recipe, "cache", None)
        provides = getattr(cache, "provides", ())
        if self.new == self.tokens:
            return self.tokens
        if "cache.static" in provides:
            return min(getattr(cache, "max_tokens", None) or self.capacity, self.capacity)
        if "cache.evicting" in provides:
            return min(self.tokens, getattr(cache, "window", self.tokens) + self.new)
        return self.tokens


VALUE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Number format → bytes of a number in it."""


def _dtype(recipe: Recipe, shape: ModelShape | None, target: Target) -> str | None:
    asked = recipe.model.dtype.value
    if asked != "auto" or shape is None:
        return None if asked == "auto" else asked
    # A config that does not tell: as `builder` does it.
    return shape.dtype or ("float32" if target.kind == "cpu" else "bfloat16")


DURING = ("", "pass", "attention", "feed-forward", "logits")
"""When memory is held: for as long as the session or the conversation (''), throughout a pass, or
in a part of it. A pass needs what is always there, what lasts for it, and the largest of its parts.
"""


UNPACKING = "unpacking"
"""Rate of what is no product of matrices: by the book as slow as the target's slowest format; where
the machine was measured, part of how fast it moves bytes."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """One named part of a pass: the memory that it holds, and the work that it is.

    Terms of one name are added up. A target turns work into seconds: by its bandwidth, by its rate
    for a number format, and by what it takes to start an operator. What a term moves and computes
    goes on at once; terms follow one another.
    """

    name: str
    bytes: int = 0
    during: str = ""
    """When these are held: one of `DURING`."""
    launches: float = 0.0
    """Operators that are started."""
    moved: float = 0.0
    """Bytes read and written."""
    flops: float = 0.0
    """Floating point (or integer) operations; a product and its sum are two."""
    rate: str = ""
    """Number format of these, a key of `target.tflops`; or `UNPACKING`."""
    seconds: float = 0.0
    """What takes its time whatever the target."""

    def __post_init__(self) -> None:
        """Refuse what cannot be: it would be lost in a sum."""
        for name in ("bytes", "launches", "moved", "flops", "seconds"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise ValueError(f"Term {self.name!r} with {name}={value}")
        if self.during not in DURING:
            raise ValueError(
                f"Term {self.name!r} during={self.during!r}, which is none of {DURING}"
            )


@dataclass(frozen=True, kw_only=True)
class PositionContext:
    """The model's config, to be copied, edited and given back."""

    config: PretrainedConfig


Bias = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""Adds to the scores: (query positions `[queries]`, key positions `[keys]`), both counted from the
first column of the cache, padding included → float32 `[1, heads, queries, keys]`. Only differences
within a row mean anything: softmax does not see what a whole row has in common."""

Scores = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""Replaces the product of queries and keys: (query `[batch, heads, queries, head_dim]`, key
`[batch, heads, keys, head_dim]`, query positions `[batch, queries]`, key positions `[batch, keys]`,
both counted from the first real token) → scores `[batch, heads, queries, keys]`, neither scaled
nor masked."""


@dataclass(frozen=True, kw_only=True)
class PositionEncoding:
    """What makes the model encode positions as the recipe says.

    `bias` and `scores` are computed by the attention that the recipe chooses, which must be able
    to: it says so with the traits `attention.bias` and `attention.scores`.
    """

    config: PretrainedConfig
    converters: Sequence[WeightConverter] = ()
    """What changes tables of positions while the weights load."""
    bias: Bias | None = None
    scores: Scores | None = None


@dataclass(frozen=True, kw_only=True)
class HeadsContext:
    """The model's config, position encoding applied."""

    config: PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class Heads:
    """A config with its numbers of heads, and the conversions that make the weights match it."""

    config: PretrainedConfig
    converters: Sequence[WeightConverter] = ()


@dataclass(frozen=True, kw_only=True)
class QuantizeContext:
    """What the weights will be, before quantizing."""

    config: PretrainedConfig
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """A quantization config of transformers, and what to do to the model once it is loaded."""

    config: QuantizationConfigMixin | None = None
    finish: Callable[[PreTrainedModel], None] | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionContext:
    """The config as position encoding and heads left it, and what these ask of attention."""

    config: PretrainedConfig
    bias: Bias | None = None
    """The core adds it to the mask that the plugin gives, which may then be additive (float)."""
    scores: Scores | None = None
    """To be called by the plugin's forward, if the plugin provides `attention.scores`."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """An implementation that transformers has, or a forward and a mask function of one's own.

    Never a forward alone: transformers then passes no mask, padding counts as text and cached
    continuation is wrong, without a word (huggingface/transformers#45811).
    """

    implementation: str | None = None
    """'eager', 'sdpa', …; None, with no forward, leaves the model its own default."""
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] | None = None
    """As `transformers.AttentionInterface`: (module, query `[batch, heads, queries, head_dim]`,
    key and value `[batch, kv_heads, keys, head_dim]`, mask, **kwargs) → output
    `[batch, queries, heads, head_dim]`, and weights or None."""
    mask: Callable[..., Any] | None = None
    """As `transformers.AttentionMaskInterface`: `transformers.masking_utils.sdpa_mask`, …. Its
    keywords: batch_size, q_length, kv_length, q_offset, kv_offset, mask_function (of batch, head,
    query and key; may be absent), attention_mask (`[batch, keys]`, of padding), dtype, config, ….
    The core adds allow_is_causal_skip=False: what it hides is hidden in each pass."""

    def __post_init__(self) -> None:
        if (self.forward is None) != (self.mask is None):
            raise ValueError("give forward and mask together, or neither")
        if self.forward is not None and self.implementation is not None:
            raise ValueError("give either an implementation's name, or forward and mask")


@dataclass(frozen=True, kw_only=True)
class LoadContext:
    """Everything that decides what the loaded model will be."""

    recipe: Recipe
    folder: Path
    """The model's files; weights of a hub model may still have to be fetched into it."""
    config: PretrainedConfig
    dtype: torch.dtype
    device: torch.device
    position_encoding: PositionEncoding
    heads: Heads
    quantization: Quantization
    attention_implementation: str | None

    @property
    def converters(self) -> list[WeightConverter]:
        """Return what to apply to the weights while they load."""
        return [*self.position_encoding.converters, *self.heads.converters]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in evaluation mode, and what turns inputs into tensors for it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    device: torch.device | None = None
    """Where inputs go; None for the device of the context."""


@dataclass(frozen=True, kw_only=True)
class PrepareContext:
    """The loaded model, verified, not yet run."""

    recipe: Recipe
    model: PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class CacheContext:
    """A conversation, or a batch, that is about to start."""

    config: PretrainedConfig
    batch: int
    max_tokens: int
    """Tokens per sequence that it may grow to; never beyond the model's context."""


@dataclass(frozen=True, kw_only=True)
class KeyValues:
    """Where keys and values of earlier tokens are kept."""

    cache: Cache | None
    """None recomputes them for each token."""


@dataclass(frozen=True, kw_only=True)
class DecodeContext:
    """A model ready to generate."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    seed: int
    end_ids: frozenset[int]
    """Tokens at which a sequence is finished."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One call of a decoder."""

    input_ids: torch.Tensor
    """`[batch, tokens]`, left-padded: all tokens of each sequence, those in the cache included."""
    attention_mask: torch.Tensor
    """`[batch, tokens]`, 0 where padded."""
    cache: Cache | None
    max_new_tokens: int
    forwarded: Callable[[], int] = lambda: 0
    """Says how many tokens went through the model so far, in all runs of the session."""


class Step(list[int]):
    """The `batch` token ids of one step, with what was measured when they were made."""

    __slots__ = ("accepted", "discarded", "drafted", "forwarded", "time")

    def __init__(
        self,
        ids: Iterable[int],
        *,
        time: float,
        forwarded: int,
        drafted: int | None = None,
        accepted: int | None = None,
        discarded: int = 0,
    ) -> None:
        super().__init__(ids)
        self.time = time
        """`time.perf_counter()` when they were made, less what their reader has taken of it."""
        self.forwarded = forwarded
        """Tokens that this generation has sent through the model until then."""
        self.drafted = drafted
        """Tokens that were guessed until then, for the model to verify; None where none are."""
        self.accepted = accepted
        """How many of these the model would have said itself."""
        self.discarded = discarded
        """Tokens among those forwarded that are in no answer: rejected drafts, other beams."""


Decoder = Callable[[Generation], Iterator[list[int]]]
"""Yields a list of `batch` token ids per step; a finished sequence yields padding.

A decoder yields a `Step` when it knows better than its reader what a step has cost: neither the
reader's pace nor another run counts as its own. A plain list is measured when it arrives.
"""


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """The session, all but its task built."""

    session: Session


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a run measured, by the clock of the decoder: a slow reader changes nothing.

    In a batch each answer has its own `prompt_tokens`, `new_tokens`, `seconds` and
    `tokens_per_second`; the others are of the batch as a whole.
    """

    prompt_tokens: int
    new_tokens: int
    forwarded_tokens: int
    """Tokens that really went through the model: less than prompt and new when a cache helped,
    more in a batch, whose padding and finished rows go along."""
    seconds: float
    """Seconds from the call to the last new token."""
    time_to_first_token: float
    """Seconds from the call to the first new token."""
    tokens_per_second: float | None
    """New tokens after the first, per second; None when there was only one."""
    peak_memory_bytes: int
    """Peak of the device's allocator on a GPU, of the whole process on a CPU."""
    drafted_tokens: int | None = None
    """Tokens that a draft guessed for the model to verify; None where nothing is drafted."""
    accepted_tokens: int | None = None
    """How many of these the model would have said itself."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """One finished answer."""

    text: str
    token_ids: list[int]
    """New tokens only."""
    finish_reason: str
    """'stop' (end token or stop string), 'length' (`decode.max_new_tokens`), 'context' (full)."""
    figures: Figures
    notes: Sequence[str] = ()
    """What the user should know of this answer, although nothing is wrong."""


class Stream(Protocol):
    """Pieces of an answer while it grows; `output` is there once they are exhausted."""

    output: Output

    def __iter__(self) -> Iterator[str]: ...
    def __next__(self) -> str: ...
    def close(self) -> None:
        """Stop generating."""


class Chat(Protocol):
    """A conversation that remembers."""

    receipt: Receipt | None
    """That the last turn processed its new tokens only; None where nothing is cached."""

    def send(self, message: str) -> Stream:
        """Answer `message`, given all that was said before."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation to a file, cache and all, for `Task.chat` to resume."""


class Task(Protocol):
    """What a recipe is for, ready to be asked."""

    def probe(self) -> None:
        """Send the smallest possible input through everything, for the receipts to look at."""

    def stream(self, prompt: str) -> Stream:
        """Answer piece by piece."""

    def batch(self, prompts: Sequence[str]) -> list[Output]:
        """Answer all prompts together."""

    def chat(self, *, resume: Path | None = None) -> Chat:
        """Start a conversation, or go on with one that was saved to a file."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A claim about a choice, with the evidence, and whether it holds."""

    slot: str
    claim: str
    """What the choice should have done."""
    evidence: Mapping[str, str | int | float | bool]
    """Numbers and names that were read from the built session, never from the recipe."""
    ok: bool
    plugin: str = field(default="", kw_only=True)
    """The choice's name; the core fills it in."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that `--json` prints."""
        return {
            "slot": self.slot,
            "plugin": self.plugin,
            "claim": self.claim,
            "evidence": dict(self.evidence),
            "ok": self.ok,
        }


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a run."""

    kind: str
    """'built', 'started', 'finished' or 'failed'."""
    data: Mapping[str, Any]
    """What there is to say of it; the hook `observe` lists the keys of each kind."""
    kept: dict[str, Any] = field(default_factory=dict)
    """Whatever the observer wants to remember within one session; receipts read it at
    `session.built["observe"]`."""
