"""Measure what the engine costs beside plain transformers: same weights, same tokens, one run.

    python tools/overhead.py [--model FOLDER] [--new 64] [--rounds 7] [--json]
    python tools/overhead.py --decode assisted decode.draft=recipes://embedded-draft
    python tools/overhead.py --decode compiled cache=static

All decode the same prompt greedily, in float32 with sdpa, taking turns; the tokens must be equal.
Printed are medians, and the ratio of each pair of turns. With `--decode` another way of decoding
takes its turns as well, with what else is given to it, and is held against decode=generate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import engine
from engine.contexts import Figures
from engine.loading import checkpoint
from engine.session import Session

PROMPT = "class Parser:\n    def __init__(self, text):\n        self.text = text\n"
"""Something that the embedded model goes on with for long."""


def main() -> None:
    """Take turns and print the table."""
    parser = argparse.ArgumentParser(description="Measure what the engine costs.")
    parser.add_argument("--model", default="recipes://embedded", help="a folder or hub id")
    parser.add_argument("--new", type=int, default=64, help="new tokens for each turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--decode", default="", help="another way of decoding, to compare")
    parser.add_argument("overrides", nargs="*", help="what else its recipe needs")
    arguments = parser.parse_args()
    folder = checkpoint.fetch_weights(arguments.model, None)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    auto: Any = AutoModelForCausalLM
    plain = auto.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    words = [
        f"model.path='{arguments.model}'",
        "model.dtype=float32",
        f"decode.max_new_tokens={arguments.new}",
    ]
    recipes = {"engine": words}
    if arguments.decode:
        other = [f"decode={arguments.decode}", *words, *arguments.overrides]
        recipes[f"decode={arguments.decode}"] = other
    figures: dict[str, Figures] = {}

    def by_transformers() -> list[int]:
        out = plain.generate(
            **inputs, max_new_tokens=arguments.new, do_sample=False, pad_token_id=0
        )
        tokens: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens

    def by_engine(name: str, session: Session) -> list[int]:
        output = session.generate(PROMPT)
        figures[name] = output.figures
        return output.token_ids

    with ExitStack() as stack:
        ways: dict[str, Callable[[], list[int]]] = {"transformers": by_transformers}
        for name, each in recipes.items():
            session = stack.enter_context(engine.build(engine.compose("base", each)))
            ways[name] = partial(by_engine, name, session)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(arguments.rounds + 1):
            answers = []
            for name, way in ways.items():
                start = time.perf_counter()
                answers.append(way())
                if turn:  # the first warms up
                    seconds[name].append(time.perf_counter() - start)
            if any(answer != answers[0] for answer in answers):
                raise SystemExit("the tokens differ: nothing to compare")
    new = len(answers[0])
    rates = {name: new / statistics.median(values) for name, values in seconds.items()}
    against = {"engine": "transformers", f"decode={arguments.decode}": "engine"}
    ratios = {
        name: statistics.median(
            ours / theirs
            for ours, theirs in zip(seconds[name], seconds[against[name]], strict=True)
        )
        for name in recipes
    }
    if arguments.json:
        found = {"tokens_per_second": rates, "seconds_ratio": ratios["engine"], "new": new}
        print(json.dumps({**found, "ratios": ratios}))
        return
    print(f"{new} new tokens, {arguments.rounds} turns each, {torch.get_num_threads()} threads")
    for name, rate in rates.items():
        drafted = figures[name].drafted_tokens if name in figures else None
        more = "" if drafted is None else f"; {figures[name].accepted_tokens} of {drafted} accepted"
        print(f"{name:16} {rate:8.1f} tokens/s, prompt and set-up of the call included{more}")
    for name, ratio in ratios.items():
        print(f"{name} takes {ratio:.3f} of the time of {against[name]}")


if __name__ == "__main__":
    main()
