"""Try a combination of choices, and hold it against plain transformers, eager, float32.

A cell is a family of models and the choices that differ from the base recipe. It is

*right*     every token is one that the reference would give, or as likely within the stated error;
*refused*   `engine.check` says why, before anything loads;
*wrong*     the tokens are others;
*late*      the build or the run fails after `check` had nothing to say.

The reference recomputes everything for each token, in a model of transformers that has the built
session's config and the numbers that its weights stand for. What a choice does to scores and masks
(windows, sinks, biases, groups) is written out once more here, as naively as it can be. Where keys
are cached unrotated, and rotated by frequencies that change, it keeps keys as well.
"""

from __future__ import annotations

import copy
import hashlib
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
)
from transformers.masking_utils import eager_mask

import engine
from engine import registry
from engine.errors import EngineError
from engine.hookspecs import SLOTS
from engine.session import Session
from tests.models import FAMILIES

EXACT = 2e-3
"""How far below the likeliest a token's logit may be, in standard deviations of the logits."""

NEW = 10
PROMPTS = ("def add(a, b):", "once upon a time there was a model of two layers", "x")
BEYOND = "long ago, before any of this was written down, " * 4
"""More tokens than the tiny models were made for; asked where a choice extends the context."""

WINDOW, SINKS = 16, 4
TORCHAO = ("int8", "float8", "int8_dynamic")

VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "heads=grouped": {"": ("heads.num_key_value_heads=1",)},
    "quantize=bitsandbytes": {
        "nf4": ("quantize.quant_type=nf4", "quantize.compute_dtype=float32"),
        "fp4": ("quantize.quant_type=fp4", "quantize.compute_dtype=float32"),
        "int8": ("quantize.bits=8",),
    },
    "quantize=torchao": {kind: (f"quantize.kind={kind}",) for kind in TORCHAO},
    "quantize=quanto": {"int8": ("quantize.bits=8",), "int4": ("quantize.bits=4",)},
    "position_encoding=self-extend": {"": ("position_encoding.window=8",)},
    "position_encoding=longrope": {
        "long": ("position_encoding.long_factor={factors}",),
        "short and long": (
            "position_encoding.long_factor={factors}",
            "position_encoding.short_factor={ones}",
        ),
    },
    "attention=sdpa": {"": (), "math": ("attention.kernel=math",)},
    "attention=chunked": {"": ("attention.query_block=8", "attention.key_block=8")},
    "attention=window": {"": (f"attention.size={WINDOW}",)},
    "attention=sinks": {"": (f"attention.sinks={SINKS}", f"attention.window={WINDOW}")},
    "cache=quantized": {
        f"int{bits}": (f"cache.bits={bits}", "cache.group_size=8", "cache.residual=8")
        for bits in (4, 8)
    },
    "decode=assisted": {"": ("decode.draft={draft}",)},
    "cache=sliding": {"": (f"cache.window={WINDOW}",)},
    "cache=sinks": {"": (f"cache.sinks={SINKS}", f"cache.window={WINDOW}")},
}
"""Options that a choice is tried with, by label; without an entry, its defaults. In braces what
depends on the family, see `_fitting`."""

COMPANIONS = {
    "position_encoding=longrope short and long": ("cache", "cache=none"),
}
"""What a choice is tried with where a cell says nothing of that slot, since it needs it."""

DRAFT = "draft"
"""Stands for a model that guesses for the others: a Llama with other weights, same vocabulary."""

BASE = {
    "load": "transformers",
    "quantize": "none",
    "heads": "native",
    "position_encoding": "native",
    "attention": "native",
    "cache": "dynamic",
    "decode": "generate",
    "task": "text-generation",
}

ROUNDING = frozenset(
    {
        "quantize=bitsandbytes int8",  # activations are rounded, too: the weights alone are not all
        "quantize=torchao int8_dynamic",
        "cache=quantized int4",
        "cache=quantized int8",
        "cache=fp8",
    }
)
"""Choices that compute in fewer bits than they are compared in. How far each goes is for its own
tests to hold; here, see `MEAN`."""

MEAN = 0.5
"""How far below the likeliest the logits of all tokens may be on average, for each choice that
rounds. Text that has nothing to do with the model is 3 away."""

ELSEWHERE = frozenset({"attention=flash", "attention=flex", "cache=offloaded", "load=gguf"})
"""Choices that need a GPU, or a file that the tiny models lack."""

SKIPPED: dict[str, str] = {}
"""Choices that are not tried here, and where they are instead."""


@dataclass(frozen=True)
class Variant:
    """A choice with options."""

    slot: str
    choice: str
    label: str
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return what tables call it."""
        return f"{self.slot}={self.choice}" + (f" {self.label}" if self.label else "")

    @property
    def words(self) -> tuple[str, ...]:
        """Return it as overrides."""
        return (f"{self.slot}={self.choice}", *self.options)


@dataclass(frozen=True)
class Cell:
    """A family and the choices that differ from the base."""

    family: str
    variants: tuple[Variant, ...]

    @property
    def name(self) -> str:
        """Return what identifies it."""
        return " + ".join((self.family, *(variant.name for variant in self.variants)))


@dataclass(frozen=True)
class Result:
    """What became of a cell."""

    verdict: str
    """'right', 'refused', 'wrong' or 'late'."""
    why: str = ""
    code: str = ""


def variants() -> list[Variant]:
    """Return every shipped choice that is not the base's, with the options it is tried with."""
    found = []
    for slot in SLOTS:
        for choice, claims in sorted(registry.installed()[slot].items()):
            ours = any(claim.distribution.startswith("recipe-engine ") for claim in claims)
            name = f"{slot}={choice}"
            if ours and slot in BASE and BASE[slot] != choice and name not in SKIPPED:
                for label, options in VARIANTS.get(name, {"": ()}).items():
                    found.append(Variant(slot, choice, label, options))
    return found


def pairs(families: Sequence[str] = FAMILIES) -> Iterator[Cell]:
    """Yield each choice alone and each pair of choices for two slots, on each family."""
    every = variants()
    for family in families:
        for one in every:
            yield Cell(family, (one,))
        for one, other in combinations(every, 2):
            if one.slot != other.slot:
                yield Cell(family, (one, other))


def combos(count: int, seed: int = 0, families: Sequence[str] = FAMILIES) -> Iterator[Cell]:
    """Yield full recipes: a family, and for every slot the base's choice or, as often, another."""
    draw = random.Random(seed)
    slots: dict[str, list[Variant]] = {slot: [] for slot in BASE}
    for each in variants():
        # Of those that this machine cannot run, and so refuses, the pairs are enough.
        if f"{each.slot}={each.choice}" not in ELSEWHERE:
            slots[each.slot].append(each)
    for _ in range(count):
        drawn = (draw.choice(every) for every in slots.values() if every and draw.random() < 0.5)
        chosen = tuple(drawn)
        yield Cell(draw.choice(families), chosen)


def compiled(families: Sequence[str] = ("llama", "gemma3", "gpt2", "mixtral")) -> Iterator[Cell]:
    """Yield compiled steps, which want a static cache, with each choice of another slot."""
    every = {variant.name: variant for variant in variants()}
    static, steps = every["cache=static"], every["decode=compiled"]
    for family in families:
        for other in every.values():
            if other.slot not in ("cache", "decode"):
                yield Cell(family, (other, static, steps))


def sample(count: int) -> list[Cell]:
    """Return some of the pairs, spread evenly and always the same."""
    every = sorted(pairs(), key=lambda cell: hashlib.sha256(cell.name.encode()).digest())
    return every[:count]


def judge(cell: Cell, folder_of: Callable[[str], Path]) -> Result:
    """Check, build and run a cell; the tiny model of each family, and "draft", is in its folder."""
    folder = folder_of(cell.family)
    words = [f"model.path={folder}", "model.dtype=float32", f"decode.max_new_tokens={NEW}"]
    given = [word for variant in cell.variants for word in variant.words]
    said = {variant.slot for variant in cell.variants}
    for slot, word in {COMPANIONS.get(variant.name, ("", "")) for variant in cell.variants}:
        given += [] if not slot or slot in said else [word]
    if any("{" in word for word in given):
        values = _fitting(folder) | {"draft": str(folder_of(DRAFT))}
        given = [word.format(**values) for word in given]
    words += given
    recipe = engine.compose("base", words)
    verdict = engine.check(recipe)
    if not verdict.ok:
        why = " | ".join(problem.message for problem in verdict.problems)
        return Result("refused", why, verdict.problems[0].code)
    try:
        with _compiling_quickly(), engine.build(recipe) as session:
            return _compare(cell, session, folder)
    except EngineError as error:
        return Result("late", str(error), error.problems[0].code)
    except Exception as error:
        return Result("late", f"{type(error).__name__}: {error}", "bug")


@contextmanager
def _compiling_quickly() -> Iterator[None]:
    """Trace as torch.compile always does, and run what was traced: compiling it takes a minute."""
    compiler: Any = torch.compile
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(compiler, backend="eager"))
        yield


@cache
def _fitting(folder: Path) -> dict[str, str]:
    """Return options that depend on the model: one factor per rotary frequency."""
    config = AutoConfig.from_pretrained(folder)
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        buffers = auto.from_config(config).named_buffers()
    sizes = [buffer.numel() for name, buffer in buffers if name.endswith("inv_freq")]
    size = sizes[0] if sizes else 8
    factors = [1.0 + index for index in range(size)]
    return {"factors": str(factors).replace(" ", ""), "ones": str([1.0] * size).replace(" ", "")}


def _compare(cell: Cell, session: Session, folder: Path) -> Result:
    prompts = list(PROMPTS)
    source = 128
    room = session.context_tokens
    if room is None or room > source + 2 * NEW:
        prompts.append(BEYOND)
    alone = [session.generate(prompt) for prompt in prompts]
    together = session.generate(prompts)
    plain = Plain(session, cell)
    if why := plain.unlike(folder):
        return Result("wrong", why)
    rounding = sum(variant.name in ROUNDING for variant in cell.variants)
    for kind, outputs in (("alone", alone), ("in a batch", together)):
        gaps: list[float] = []
        for prompt, output in zip(prompts, outputs, strict=True):
            ids = list(session.tokenizer(prompt)["input_ids"])
            if len(output.token_ids) != NEW and output.token_ids[-1:] != [2]:
                return Result("wrong", f"{len(output.token_ids)} tokens, not {NEW}, {kind}")
            gaps += plain.gaps(ids, output.token_ids)
        found = statistics.mean(gaps) if rounding else max(gaps)
        found = found if all(map(math.isfinite, gaps)) else math.nan
        limit = rounding * MEAN or EXACT
        if not found <= limit:
            return Result("wrong", f"{kind}: {found:.4f} below the likeliest, not {limit}")
    return Result("right")


class Plain:
    """A model of transformers with a session's config and weights, and the rest by hand."""

    def __init__(self, session: Session, cell: Cell) -> None:
        """Copy config and weights; what the weights stand for, where they are packed."""
        self.session = session
        config = copy.deepcopy(session.model.config)
        rope = str(getattr(config.get_text_config(), "rope_parameters", ""))
        self._grows = "'dynamic'" in rope or "'longrope'" in rope
        self._keeps = session.built["position_encoding"].rotation is not None
        positions = session.recipe.choices["position_encoding"]
        tables = ("wpe.weight", "embed_positions.weight")
        self._replaced = tables if positions in ("alibi", "sinusoidal") else ()
        own = "model.attention_interface" in session.shape.traits
        # Falcon with ALiBi is wrong in eager, see tests/test_equality.py.
        usual = "sdpa" if session.shape.model_type == "falcon" else "eager"
        config._attn_implementation = "byhand" if own else usual
        config.__dict__.pop("quantization_config", None)
        auto: Any = AutoModelForCausalLM
        AttentionInterface.register("byhand", _attention)
        AttentionMaskInterface.register("byhand", eager_mask)
        self.model = auto.from_config(config, dtype=torch.float32).eval()
        self.weights = numbers(session.model)
        packed = dict(session.model.named_modules())
        for name, module in self.model.named_modules():
            if type(module).__name__ == "Conv1D" != type(packed[name]).__name__:
                # GPT-2 keeps its layers the other way around, and packed ones do not.
                self.weights[f"{name}.weight"] = self.weights[f"{name}.weight"].T
        self.model.load_state_dict(self.weights, strict=False)
        missing = set(self.model.state_dict()) - set(self.weights)
        assert not missing, f"the reference lacks {sorted(missing)[:3]}"
        self.model.tie_weights()
        _Hand.positions = session.built["position_encoding"]
        _Hand.windows = _windows(cell)
        _Hand.kinds = session.shape.layer_types

    def unlike(self, folder: Path) -> str:
        """Return how the weights differ from those of the checkpoint, pooled by hand; '' if not."""
        if type(self.session.recipe.load).__name__ == "Random":
            return ""
        quantized = type(self.session.recipe.quantize).__name__ != "Unquantized"
        for name, stored in _checkpoint(folder).items():
            found = self.weights.get(name)
            if found is None:
                return f"{name} is gone"
            if found.shape != stored.shape and name.endswith(
                (".k_proj.weight", ".v_proj.weight", ".k_proj.bias", ".v_proj.bias")
            ):
                dim = self.session.shape.head_dim
                groups = found.shape[0] // dim
                stored = stored.reshape(groups, -1, dim, *stored.shape[1:]).mean(1).flatten(0, 1)
            if found.shape != stored.shape:
                continue  # a table of positions that was stretched
            away = float((found - stored).norm() / (stored.norm() + 1e-9))
            if away > (0.25 if quantized else 1e-6) and not name.endswith(self._replaced):
                return f"{name} is {away:.4f} away from the checkpoint's"
        return ""

    @torch.no_grad()
    def logits(self, prompt: list[int], new: list[int]) -> torch.Tensor:
        """Return the logits that each new token was drawn from, `[new tokens, vocabulary]`."""
        ids = [*prompt, *new[:-1]]
        if self._keeps:
            # What earlier tokens have become depends on how long the text was then.
            kept = self._cache()
            steps = [prompt, *([token] for token in new[:-1])]
            return torch.stack([self._pass(step, kept)[-1] for step in steps])
        if not self._grows:
            return self._pass(ids)[len(prompt) - 1 :]
        # Its frequencies depend on how long the text is: each token has a text of its own.
        return torch.stack([self._pass(ids[: len(prompt) + i])[-1] for i in range(len(new))])

    def _cache(self) -> DynamicCache:
        """Return one that keeps every key; where layers keep a state, that too."""
        windows = {"full_attention", "sliding_attention"}
        own = {} if windows.issuperset(_Hand.kinds) else {"config": self.model.config}
        made: Any = DynamicCache
        return made(**own)  # type: ignore[no-any-return]

    def _pass(self, ids: list[int], kept: DynamicCache | None = None) -> torch.Tensor:
        given = torch.tensor([ids])
        if kept is not None:
            found = self.model(input_ids=given, past_key_values=kept, use_cache=True).logits
            return found[0].float()  # type: ignore[no-any-return]
        mask: torch.Tensor = torch.ones_like(given)
        if _Hand.windows and self.model.config._attn_implementation != "byhand":
            hidden = _hidden(len(ids), _Hand.windows)
            mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
            mask = mask[None, None]
        found = self.model(input_ids=given, attention_mask=mask, use_cache=False).logits
        return found[0].float()  # type: ignore[no-any-return]

    def gaps(self, prompt: list[int], new: list[int]) -> list[float]:
        """Return how far below the likeliest each token's logit is, in standard deviations."""
        if "decode.beam" in self.session.traits:
            return [self._beam_gap(prompt, new) / len(new)]
        logits = self.logits(prompt, new)
        taken = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
        found: list[float] = ((logits.amax(1) - taken) / logits.std(1)).tolist()
        return found

    @torch.no_grad()
    def _beam_gap(self, prompt: list[int], new: list[int]) -> float:
        """Return how much less likely a text is than the one that plain beam search finds."""
        given = torch.tensor([prompt])
        beams = self.session.recipe.decode.num_beams
        found = self.model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False,
            num_beams=beams, use_cache=self._keeps,
            **({"past_key_values": self._cache()} if self._keeps else {}),
        )[0, len(prompt) :].tolist()  # fmt: skip
        return max(0.0, self._likelihood(prompt, found) - self._likelihood(prompt, new))

    def _likelihood(self, prompt: list[int], new: list[int]) -> float:
        likely = self.logits(prompt, new).log_softmax(-1)
        return float(likely.gather(1, torch.tensor(new)[:, None]).sum())


def numbers(model: Any) -> dict[str, torch.Tensor]:
    """Return a state dict in float32, of what the weights stand for."""
    found = {}
    for name, module in model.named_modules():
        for leaf, tensor in module.named_parameters(recurse=False):
            found[f"{name}.{leaf}" if name else leaf] = _plain(module, leaf, tensor)
        for leaf, tensor in module.named_buffers(recurse=False):
            if leaf not in module._non_persistent_buffers_set:
                found[f"{name}.{leaf}" if name else leaf] = tensor.detach().clone().float()
    head = model.get_output_embeddings()
    if head is not None and model.config.get_text_config().tie_word_embeddings:
        found["lm_head.weight"] = found.get(
            "lm_head.weight", model.get_input_embeddings().weight.detach().float()
        )
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _plain(module: Any, leaf: str, parameter: Any) -> Any:
    tensor = parameter.detach()
    kind = type(module).__name__
    if leaf == "weight" and kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(tensor.data, module.weight.quant_state).float()
    if leaf == "weight" and kind == "Linear8bitLt":
        scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        return tensor.float() * scales[:, None].float() / 127
    if hasattr(tensor, "dequantize") and type(tensor.data) is not torch.Tensor:
        return tensor.dequantize().float()
    return tensor.clone().float()


@cache
def _checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _windows(cell: Cell) -> list[tuple[int, int, bool]]:
    """Return (tokens kept at the start, tokens seen back, of full layers only) by choice."""
    found = []
    for variant in cell.variants:
        only_full = variant.slot == "cache"
        if variant.choice == "window" or (only_full and variant.choice == "sliding"):
            found.append((0, WINDOW, only_full))
        elif variant.choice == "sinks":
            found.append((SINKS, WINDOW, only_full))
    return found


class _Hand:
    """What the attention by hand has to do: one model is compared at a time."""

    positions: Any = None
    windows: Sequence[tuple[int, int, bool]] = ()
    kinds: Sequence[str] = ()


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q k / sqrt(d)) v, for one sequence, all of it at once, or the last of its queries."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    length = key.shape[2]
    keys = torch.arange(length)
    at = keys[length - query.shape[2] :]
    if _Hand.positions.rotation is not None:
        turn = _Hand.positions.rotation(query, at[None], keys[None])
        query, key = turn(module.layer_idx, query, key)
    if _Hand.positions.scores is None:
        scores = query @ key.transpose(2, 3)
    else:
        scores = _Hand.positions.scores(query, key, at[None], keys[None])
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if _Hand.positions.bias is not None:
        heads = query.shape[1]
        scores = scores - _slopes(heads)[:, None, None] * (at[:, None] - keys[None, :])
    full = _Hand.kinds[module.layer_idx] == "full_attention"
    hidden = _hidden(length, [each for each in _Hand.windows if full or not each[2]])[at]
    if attention_mask is not None:  # the model's own windows
        hidden = hidden | (attention_mask[0, 0, :, :length] < -1)
    scores = scores.masked_fill(hidden, -torch.inf)
    if s_aux is not None:
        extra = s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _hidden(length: int, windows: Sequence[tuple[int, int, bool]]) -> torch.Tensor:
    """Return which keys a query must not see, `[queries, keys]`."""
    at = torch.arange(length)
    hidden = at[None, :] > at[:, None]
    for sinks, window, _ in windows:
        hidden = hidden | ((at[:, None] - at[None, :] >= window) & (at[None, :] >= sinks))
    return hidden


def _slopes(heads: int) -> torch.Tensor:
    """Return ALiBi's slopes for a number of heads that is a power of two."""
    assert math.log2(heads).is_integer()
    return torch.tensor([2.0 ** (-8 * (head + 1) / heads) for head in range(heads)])
