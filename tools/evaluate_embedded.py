"""Measure the embedded model: loss, bits per byte, held-out prompts and the guide's dialogue.

python tools/evaluate_embedded.py [--model PATH] [--dtype float32|bfloat16|nf4] [--json]
python tools/evaluate_embedded.py --draft [--model PATH]

The second measures a draft model: its loss, and how many of its guesses the embedded model takes.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import catalogue  # type: ignore[import-not-found]
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import engine

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
MODEL, DRAFT = RECIPES / "embedded", RECIPES / "embedded-draft"
LENGTH = 512
SEED = 0
LIBRARY_ROWS = 128
CATALOGUE_SAMPLES = 300
# Model output runs in a process of its own: it may loop, print or raise anything.
RUNNER = (
    "import json, sys; sys.path.insert(0, sys.argv[1]); import catalogue; "
    "code, inputs = eval(sys.stdin.read()); "
    "print(json.dumps(catalogue.behavior(code, inputs)))"
)


def load(path: Path, dtype: str) -> tuple[Any, Any]:
    """Load the model and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if dtype != "nf4":
        plain: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        return plain.eval(), tokenizer
    from bitsandbytes.nn.modules import Linear4bit

    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # As the engine does: no repacking on first use, the same weights on every processor.
            module.support_avx512bf16_for_cpu = False
    return model.eval(), tokenizer


@torch.inference_mode()
def loss_of(model: Any, rows: list[list[int]]) -> tuple[float, int]:
    """Return the summed loss of rows of tokens and how many tokens were predicted."""
    total, count = 0.0, 0
    rows = sorted(rows, key=len)
    for start in range(0, len(rows), 16):
        batch = rows[start : start + 16]
        width = max(map(len, batch))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in batch])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in batch])[:, 1:]
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="sum"
        )
        total += losses.item()
        count += int((labels != -100).sum())
    return total, count


def part_figures(total: float, count: int, size: int) -> dict[str, float]:
    """Return the loss per token and the bits per byte."""
    return {"nats_per_token": total / count, "bits_per_byte": total / math.log(2) / size}


def validation(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Measure the loss on held-out files and on held-out catalogue documents."""
    end = tokenizer.eos_token_id
    tokens: list[int] = []
    for path in catalogue.library_files(held_out=True):
        tokens += tokenizer.encode(path.read_text("utf-8", "replace"), verbose=False)
        tokens.append(end)
    windows = [tokens[start : start + LENGTH] for start in range(0, len(tokens), LENGTH)]
    # Windows from all over the files, each predicted without what stands before it.
    windows = windows[:: max(1, len(windows) // LIBRARY_ROWS)]
    size = sum(
        len(tokenizer.decode(row[1:]).replace(catalogue.END, "\0").encode()) for row in windows
    )
    found = {"library": part_figures(*loss_of(model, windows), size)}
    samples = catalogue.held_out_samples(SEED + 1, CATALOGUE_SAMPLES)
    rows = [
        [end] + [t for part in drawn.segments for t in tokenizer.encode(part)] for drawn in samples
    ]
    size = sum(len(drawn.text.replace(catalogue.END, "\0").encode()) for drawn in samples)
    found["catalogue"] = part_figures(*loss_of(model, rows), size)
    return found


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[str]:
    """Complete prompts greedily, up to the end token."""
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), 25):
        places = order[start : start + 25]
        batch = tokenizer.pad({"input_ids": [prompts[p] for p in places]}, return_tensors="pt")
        made = model.generate(
            **batch, do_sample=False, max_new_tokens=160, pad_token_id=tokenizer.pad_token_id
        )
        for place, row in zip(places, made[:, batch["input_ids"].shape[1] :], strict=True):
            texts[place] = tokenizer.decode(row).split(catalogue.END)[0]
    return texts


def judge(code: str, function: catalogue.Function) -> tuple[bool, bool]:
    """Tell whether code compiles and whether it does what the reference does."""
    try:
        compile(code, "<answer>", "exec")
    except (SyntaxError, ValueError):
        return False, False
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", RUNNER, str(Path(__file__).parent)],
            input=repr((code, function.inputs)),
            capture_output=True,
            text=True,
            timeout=10,
        )
        got = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return True, False
    return True, got == catalogue.behavior(function.code, function.inputs)


def prompts(model: Any, tokenizer: Any, count: int) -> dict[str, Any]:
    """Let the model complete held-out prompts and count what compiles and what is right."""
    samples = catalogue.held_out_samples(SEED, count)
    asked = [
        [token for part in drawn.segments[:-1] for token in tokenizer.encode(part)]
        for drawn in samples
    ]
    kinds: dict[str, list[int]] = {}
    wrong = []
    for drawn, text in zip(samples, complete(model, tokenizer, asked), strict=True):
        code = drawn.segments[0] + text if drawn.kind == "completion" else text
        compiles, right = judge(code, drawn.function)
        tally = kinds.setdefault(drawn.kind, [0, 0, 0])
        tally[:] = [tally[0] + 1, tally[1] + compiles, tally[2] + right]
        if not right:
            wrong.append(
                {
                    "family": drawn.family,
                    "kind": drawn.kind,
                    "wanted": drawn.function.code,
                    "got": code,
                }
            )
    return {
        "prompts": count,
        "compile": sum(tally[1] for tally in kinds.values()),
        "right": sum(tally[2] for tally in kinds.values()),
        "by_kind": {
            kind: dict(zip(("prompts", "compile", "right"), tally, strict=True))
            for kind, tally in kinds.items()
        },
        "wrong": wrong,
    }


def dialogue(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Hold the guide's dialogue through the chat template."""
    reference = catalogue.guide()
    messages: list[dict[str, str]] = []
    right = []
    for place, text in enumerate(catalogue.GUIDE):
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        content = complete(model, tokenizer, [prompt])[0]
        messages.append({"role": "assistant", "content": content})
        right.append(f"{content}{catalogue.END}" == reference.segments[2 * place + 1])
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return {"right": right, "text": text}


def evaluate(path: Path, dtype: str, count: int = 100) -> dict[str, Any]:
    """Measure everything with one data type."""
    model, tokenizer = load(path, dtype)
    return {
        "dtype": dtype,
        **validation(model, tokenizer),
        **prompts(model, tokenizer, count),
        "guide": dialogue(model, tokenizer),
    }


def drafting(draft: Path, count: int) -> dict[str, Any]:
    """Let a draft guess for the embedded model, on held-out prompts, in float32."""
    model, tokenizer = load(draft, "float32")
    found: dict[str, Any] = {**validation(model, tokenizer), "parameters": model.num_parameters()}
    words = [f"model.path='{MODEL}'", "model.dtype=float32", "decode.max_new_tokens=128"]
    assisted = [*words, "decode=assisted", f"decode.draft='{draft}'"]
    totals = dict.fromkeys(("prompts", "tokens", "passes", "drafted", "accepted", "equal"), 0)
    with (
        engine.build(engine.compose("base", words)) as plain,
        engine.build(engine.compose("base", assisted)) as session,
    ):
        passes: list[int] = []
        session.model.register_forward_pre_hook(lambda *_: passes.append(1))
        for drawn in catalogue.held_out_samples(SEED, count):
            prompt = "".join(drawn.segments[:-1])
            output = session.generate(prompt)
            totals["prompts"] += 1
            totals["tokens"] += output.figures.new_tokens
            totals["drafted"] += output.figures.drafted_tokens or 0
            totals["accepted"] += output.figures.accepted_tokens or 0
            totals["equal"] += output.token_ids == plain.generate(prompt).token_ids
        totals["passes"] = len(passes)
    return {**found, **totals}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draft", action="store_true", help="measure a draft model")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "nf4"), default="float32")
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.draft:
        print(json.dumps(drafting(arguments.model or DRAFT, arguments.prompts), indent=2))
        return
    found = evaluate(arguments.model or MODEL, arguments.dtype, arguments.prompts)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for miss in found["wrong"]:
        print(
            f"wrong ({miss['family']}, {miss['kind']}):\n{miss['got']}\nwanted:\n{miss['wanted']}\n"
        )
    for part in ("library", "catalogue"):
        loss, bits = found[part]["nats_per_token"], found[part]["bits_per_byte"]
        print(f"{part}: {loss:.3f} nats/token, {bits:.3f} bits/byte")
    total, compiled, right = found["prompts"], found["compile"], found["right"]
    print(f"of {total} held-out prompts {compiled} compile, {right} are right")
    for kind, tally in found["by_kind"].items():
        total, compiled, right = tally.values()
        print(f"  {kind}: {compiled} compile and {right} are right of {total}")
    print(f"the guide's dialogue: {'right' if all(found['guide']['right']) else 'WRONG'}\n")
    print(found["guide"]["text"])


if __name__ == "__main__":
    main()
