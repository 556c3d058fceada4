"""Whatever should not change an answer does not; whatever may, stays within a stated error.

The reference is transformers alone: `AutoModelForCausalLM.from_pretrained(folder)`, eager, float32,
`generate(do_sample=False)`. Prompts and answers are longer than the sliding windows (16 tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from engine.errors import RecipeError
from tests.conftest import Build
from tests.models import SPECIAL

FAMILIES = (
    "llama",
    "mistral",
    "qwen3",
    "gemma3",
    "gpt2",
    "gpt_bigcode",
    "bloom",
    "falcon",
)
PROMPTS = ["def add(a, b):", "a", "once upon a time there was a model of two layers only"]
NEW = 24
SETTINGS = {
    f"{family}-{attention}-{cache}": (family, attention, cache)
    for family, attention, cache in product(
        FAMILIES, ("native", "eager", "sdpa"), ("none", "dynamic", "static")
    )
}
REFUSED = {
    "bloom": ("attention=sdpa", "cache=static"),  # transformers has neither for it
    "falcon": ("attention=eager", "cache=static"),  # the former is wrong there, see `reference`
}

Folder = Callable[[str], Path]


@cache
def reference(family: str, folder: Path) -> Any:
    """Return the model of transformers alone.

    Not eager for Falcon with ALiBi: transformers 5.23 adds its biases twice there. That SDPA is
    right is shown by `test_falcon_is_what_its_paper_says`.
    """
    auto: Any = AutoModelForCausalLM
    implementation = "sdpa" if family == "falcon" else "eager"
    return auto.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=implementation
    ).eval()


def greedy(model: Any, folder: Path, prompts: list[str], new: int = NEW) -> list[list[int]]:
    """Return the new tokens of each prompt, answered together, padded on the left."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new)
    rows: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return rows


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Return the logits of a fixed prompt, `[1, 40, vocabulary]`."""
    ids = (torch.arange(40)[None] * 7 + 3) % 300 + len(SPECIAL)
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of what was expected."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_those_of_plain_transformers(build: Build, model: Folder, name: str) -> None:
    family, attention, kept = SETTINGS[name]
    choices = (f"attention={attention}", f"cache={kept}")
    folder = model(family)
    if set(choices) & set(REFUSED.get(family, ())):
        with pytest.raises(RecipeError):
            build(*choices, family=family)
        return
    session = build(*choices, f"decode.max_new_tokens={NEW}", family=family)
    plain = reference(family, folder)
    for prompt in PROMPTS:
        assert [session.generate(prompt).token_ids] == greedy(plain, folder, [prompt])
    together = [output.token_ids for output in session.generate(PROMPTS)]
    assert together == greedy(plain, folder, PROMPTS)


def test_the_windows_are_left_behind(model: Folder) -> None:
    """Or the test above would prove nothing about sliding windows."""
    folder = model("mistral")
    plain = reference("mistral", folder)
    ids = (torch.arange(40)[None] * 7 + 3) % 300 + len(SPECIAL)
    assert plain.config.sliding_window == 16
    with torch.no_grad():
        changed = ids.clone()
        changed[0, 0] += 1
        difference = (plain(ids).logits - plain(changed).logits).abs().amax((0, 2))
    assert difference[0] > 0
    assert difference[31:].max() == 0  # two layers of a window of 16 see back 30 tokens


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "falcon"])
def test_padding_does_not_count(build: Build, family: str) -> None:
    session = build(f"decode.max_new_tokens={NEW}", family=family)
    alone = [session.generate(prompt).token_ids for prompt in PROMPTS]
    assert [output.token_ids for output in session.generate(PROMPTS)] == alone


def test_falcon_is_what_its_paper_says(build: Build) -> None:
    """ALiBi, Press et al. 2021, arXiv 2108.12409, section 3, computed from the bare weights."""
    session = build(family="falcon")
    falcon: Any = session.model.transformer
    ids = (torch.arange(40)[None] * 7 + 3) % 300 + len(SPECIAL)
    slopes = torch.tensor([2.0 ** (-2 * (head + 1)) for head in range(4)])[:, None, None]
    future = torch.ones(40, 40).triu(1).bool()
    with torch.no_grad():
        hidden = falcon.word_embeddings(ids)
        for block in falcon.h:
            fused = block.self_attention.query_key_value(block.input_layernorm(hidden))
            query, key, value = fused.view(1, 40, 4, 3, 16).permute(3, 0, 2, 1, 4)
            # The model was trained with the biases scaled like the scores.
            scores = (query @ key.transpose(-1, -2) + slopes * torch.arange(40)) / 16**0.5
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)
            mixed = (weights @ value).transpose(1, 2).reshape(1, 40, 64)
            hidden = hidden + block.self_attention.dense(mixed)
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        expected = session.model.lm_head(falcon.ln_f(hidden))
    assert error(logits(session.model), expected) < 1e-5


# --- lossy choices -----------------------------------------------------------------------------

NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)
"""Dettmers et al. 2023, arXiv 2305.14314, appendix E."""
_E2M1 = (0.0, 0.0625 / 12, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1.0)
FP4 = (*(-value for value in _E2M1[1:]), *_E2M1)
"""Sign, two bits of exponent and one of mantissa, over the largest; bitsandbytes' subnormal."""


def packed(weight: torch.Tensor, values: tuple[float, ...]) -> torch.Tensor:
    """Return what blocks of 64 become when each number is the nearest value times the largest."""
    known = torch.tensor(values)
    blocks = weight.flatten().view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / scale)[..., None] - known).abs().argmin(-1)
    return (known[nearest] * scale).view_as(weight)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Return what rows become in int8: 127 steps up to the largest number of each."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def changed(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a new reference whose linear layers, the head excepted, were changed by hand."""
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, layer in model.named_modules():
            if type(layer) is torch.nn.Linear and name != "lm_head":
                layer.weight.copy_(change(layer.weight))
    return model


LOSSY: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float, float]] = {
    # choice: by hand, error against that, error against the unquantized model
    "quant_type=nf4": (lambda weight: packed(weight, NF4), 1e-3, 0.6),
    "quant_type=fp4": (lambda weight: packed(weight, FP4), 1e-3, 0.8),
    "bits=8": (rounded, 0.1, 0.1),  # activations are rounded to int8, too
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3", "bloom"])
@pytest.mark.parametrize("choice", LOSSY)
def test_bitsandbytes_stays_within_its_error(
    build: Build, model: Folder, family: str, choice: str
) -> None:
    by_hand, from_hand, from_exact = LOSSY[choice]
    exact = () if choice == "bits=8" else ("quantize.compute_dtype=float32",)
    session = build(
        "attention=eager", "quantize=bitsandbytes", f"quantize.{choice}", *exact, family=family
    )
    found = logits(session.model)
    assert error(found, logits(changed(model(family), by_hand))) < from_hand
    assert error(found, logits(reference(family, model(family)))) < from_exact


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_yarn_gives_the_tokens_of_transformers_own(
    build: Build, model: Folder, family: str
) -> None:
    folder = model(family)
    config = AutoConfig.from_pretrained(folder)
    config.rope_parameters |= {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }
    config.max_position_embeddings *= 4
    auto: Any = AutoModelForCausalLM
    plain = auto.from_pretrained(folder, config=config, attn_implementation="eager").eval()
    session = build("position_encoding=yarn", f"decode.max_new_tokens={NEW}", family=family)
    beyond = [*PROMPTS, "x" * 200]  # the context was 128 tokens
    assert [session.generate(prompt).token_ids for prompt in beyond] == [
        greedy(plain, folder, [prompt])[0] for prompt in beyond
    ]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
def test_grouped_heads_give_the_tokens_of_means_by_hand(
    build: Build, model: Folder, family: str
) -> None:
    folder = model(family)

    def mean_of_both(weight: torch.Tensor) -> torch.Tensor:
        first, second = weight[:16], weight[16:]  # two key/value heads of 16 rows each
        return torch.cat([(first + second) / 2] * 2)

    auto: Any = AutoModelForCausalLM
    plain = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if ".k_proj." in name or ".v_proj." in name:
                weight.copy_(mean_of_both(weight))
    session = build("heads=grouped", f"decode.max_new_tokens={NEW}", family=family)
    assert [session.generate(prompt).token_ids for prompt in PROMPTS] == [
        greedy(plain, folder, [prompt])[0] for prompt in PROMPTS
    ]
