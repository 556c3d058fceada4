"""Measure what the engine costs beside plain transformers: same weights, same tokens, one run.

    python tools/overhead.py [--model FOLDER] [--new 64] [--rounds 7] [--json]

Both decode the same prompt greedily, in float32 with sdpa and a dynamic cache, taking turns; the
tokens must be equal. Printed are medians, and the ratio of each pair of turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import engine
from engine import checkpoint

PROMPT = "class Parser:\n    def __init__(self, text):\n        self.text = text\n"
"""Something that the embedded model goes on with for long."""


def main() -> None:
    """Take turns and print the table."""
    parser = argparse.ArgumentParser(description="Measure what the engine costs.")
    parser.add_argument("--model", default="recipes://embedded", help="a folder or hub id")
    parser.add_argument("--new", type=int, default=64, help="new tokens for each turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    folder = checkpoint.fetch_weights(arguments.model, None)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    auto: Any = AutoModelForCausalLM
    plain = auto.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    recipe = engine.compose(
        "base",
        [
            f"model.path='{arguments.model}'",
            "model.dtype=float32",
            f"decode.max_new_tokens={arguments.new}",
        ],
    )
    with engine.build(recipe) as session:
        seconds: dict[str, list[float]] = {"transformers": [], "engine": []}
        for turn in range(arguments.rounds + 1):
            start = time.perf_counter()
            out = plain.generate(
                **inputs, max_new_tokens=arguments.new, do_sample=False, pad_token_id=0
            )
            middle = time.perf_counter()
            output = session.generate(PROMPT)
            end = time.perf_counter()
            if output.token_ids != out[0, inputs["input_ids"].shape[1] :].tolist():
                raise SystemExit("the tokens differ: nothing to compare")
            if turn:  # the first warms up
                seconds["transformers"].append(middle - start)
                seconds["engine"].append(end - middle)
    ratios = [ours / theirs for theirs, ours in zip(*seconds.values(), strict=True)]
    new = output.figures.new_tokens
    rates = {name: new / statistics.median(values) for name, values in seconds.items()}
    found = {"tokens_per_second": rates, "seconds_ratio": statistics.median(ratios), "new": new}
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"{new} new tokens, {arguments.rounds} turns each, {torch.get_num_threads()} threads")
    for name, rate in rates.items():
        print(f"{name:12} {rate:8.1f} tokens/s, prompt and set-up of the call included")
    print(f"engine takes {statistics.median(ratios):.3f} of the time of transformers")


if __name__ == "__main__":
    main()
