"""Show what uptraining gives pooled heads: Ainslie et al. 2023, arXiv 2305.13245, in minutes.

    python tools/uptrain.py [--minutes 4 | --steps 600] [--share 0.05] [--json]

trains a small model with as many key/value heads as query heads (MHA) on the data of
train_embedded.py, pools them with the engine's heads=grouped to grouped-query and to multi-query
attention, and trains each on for `share` of the steps, with fresh optimizers. Beside it stands the
same model trained on with all its heads, and key/value projections drawn at random instead of
pooled. Losses are nats per token on held-out files of the standard library.

The pooling is the paper's (section 2.1); the model, the data and the optimizers are not.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate_embedded  # type: ignore[import-not-found]
import torch
import train_embedded as embedded  # type: ignore[import-not-found]
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import engine

HEADS, HEAD_DIM, LAYERS = 8, 16, 4
GROUPED = (2, 1)
"""Key/value heads to pool to: grouped-query, and multi-query attention."""
LENGTH = 128
HELD_OUT_ROWS = 128
RATE = 4e-3
WARM_UP = 50
"""Steps until which the rate grows, in train_embedded.py."""
AGAIN = 0.3
"""Share of the highest learning rate at which training goes on."""


def build_model(tokenizer: Any) -> Any:
    """Build the untrained model, with a key/value head for each query head."""
    config = LlamaConfig(
        vocab_size=embedded.VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=3 * HEADS * HEAD_DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=embedded.LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(
    model: Any, batches: Any, first: int, rate: float, progress: Callable[[int], float]
) -> int:
    """Train until progress is 1, beginning with the batch `first`; return the number of steps."""
    tools = embedded.optimizers(model, rate)
    model.train()
    step = 0
    while (done := progress(step)) < 1:
        # The model that trains on needs no warm-up, and has too few steps for one.
        factor = embedded.rate_at(done, step + (WARM_UP if first else 0))
        for tool in tools:
            for group in tool.param_groups:
                group["lr"] = rate * factor
        tokens, weights = batches.draw(first + step, LENGTH)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        weights = weights[:, 1:].flatten()
        ((loss * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for tool in tools:
            tool.step()
            tool.zero_grad(set_to_none=True)
        step += 1
    model.eval()
    return step


def pooled(folder: Path, kv_heads: int) -> Any:
    """Return the model of a folder as the engine pools it."""
    words = [f"model.path={folder}", "model.dtype=float32", "heads=grouped", "attention=sdpa"]
    recipe = engine.compose("base", [*words, f"heads.num_key_value_heads={kv_heads}"])
    with engine.build(recipe) as session:
        return session.model


def randomized(model: Any) -> Any:
    """Return a copy whose key and value projections are drawn as for an untrained model."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            torch.nn.init.normal_(parameter, std=model.config.initializer_range)
    return model


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, pool, train on; return all losses."""
    torch.manual_seed(arguments.seed)
    started = time.monotonic()
    tokenizer: Any = AutoTokenizer.from_pretrained(embedded.OUT)
    batches = embedded.Batches(tokenizer, arguments.seed, arguments.rows)
    held_out = embedded.encode_library(tokenizer, held_out=True)
    apart = len(held_out) // HELD_OUT_ROWS
    rows = [held_out[i * apart : i * apart + LENGTH] for i in range(HELD_OUT_ROWS)]

    def loss(model: Any) -> float:
        total, count = evaluate_embedded.loss_of(model, rows)
        return float(total / count)

    # Five models train on for their share: the first training leaves them the time.
    models = 1 + 2 * len(GROUPED)
    seconds = arguments.minutes * 60 / (1 + models * arguments.share)
    begun = time.monotonic()

    def progress(step: int) -> float:
        if arguments.steps:
            return step / float(arguments.steps)
        return (time.monotonic() - begun) / float(seconds)

    original = build_model(tokenizer)
    steps = train(original, batches, 0, RATE, progress)
    more = math.ceil(steps * arguments.share)

    def go_on(model: Any) -> float:
        train(model, batches, steps, RATE * AGAIN, lambda step: step / more)
        return loss(model)

    table = []

    def add(what: str, kv_heads: int, model: Any) -> None:
        before = loss(model)
        table.append({"model": what, "kv_heads": kv_heads, "before": before, "after": go_on(model)})

    with tempfile.TemporaryDirectory() as folder:
        original.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        add("trained", HEADS, original)
        for kv_heads in GROUPED:
            model = pooled(Path(folder), kv_heads)
            control = randomized(model)
            add("pooled", kv_heads, model)
            add("at random", kv_heads, control)
    return {
        "steps": steps,
        "steps_more": more,
        "tokens_per_step": arguments.rows * embedded.LENGTH,
        "parameters": sum(parameter.numel() for parameter in original.parameters()),
        "seconds": time.monotonic() - started,
        "table": table,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4.0, help="time for all training")
    parser.add_argument("--steps", type=int, default=0, help="steps of the first training instead")
    parser.add_argument("--share", type=float, default=0.05, help="of the steps, to train on for")
    parser.add_argument("--rows", type=int, default=4, help="rows of 512 tokens per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = measure(arguments)
    if arguments.json:
        print(json.dumps(found))
        return
    print(
        f"{found['parameters']:,} parameters, {HEADS} query heads; {found['steps']} steps of "
        f"{found['tokens_per_step']} tokens, then {found['steps_more']} more; "
        f"{found['seconds'] / 60:.1f} minutes in all. Nats per held-out token:\n"
    )
    print(f"| key/value heads | how | before | after {found['steps_more']} steps more |")
    print("| --- | --- | --- | --- |")
    for row in found["table"]:
        print(f"| {row['kv_heads']} | {row['model']} | {row['before']:.3f} | {row['after']:.3f} |")


if __name__ == "__main__":
    main()
