"""Train the embedded model: tokenizer, weights, figures and card, from data made on the spot.

    python tools/train_embedded.py --minutes 60

writes recipes/embedded/, and with --draft recipes/embedded-draft/: a smaller model with the same
tokenizer, which drafts for the other one (decode=assisted). The data are the sources of the
standard library of the interpreter that runs this, and the generated catalogue of small functions
(see catalogue.py). Interrupted, the same command continues from the last checkpoint in the work
folder.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import platform
import random
import shutil
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import catalogue  # type: ignore[import-not-found]
import evaluate_embedded  # type: ignore[import-not-found]
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
OUT, DRAFT_OUT = RECIPES / "embedded", RECIPES / "embedded-draft"
LENGTH = 512
MORE_PROMPTS = 400
# Most of the training uses shorter rows: nearly every document fits, and attention costs less.
SHORT, SHORT_UNTIL = 256, 0.75
VOCABULARY = 2048
PAD = "<|pad|>"
# Words keep their leading space, every digit is a token: numbers are then copied digit by digit.
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ 'Question: ' + message['content'] + '\n\n' }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ 'Answer:' + message['content'] + '<|end|>\n\n' }}"
    "{%- else -%}"
    "{{ message['content'] + '\n\n' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Answer:' }}{%- endif -%}"
)
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [code, python]
---

# Embedded model

A causal language model of 2.76 million parameters that writes small Python functions. It is small
enough to be kept in the repository, so that every part of the engine can be tried offline with a
model that answers something sensible. It is not an assistant: it knows the functions of its
catalogue and their combinations, in the wording of its catalogue, and nothing else. Anything else
it answers with some function all the same: "Write a function that reverses a string." is not how
the catalogue puts it, and comes out wrong. English only, 512 tokens of context.

`LlamaForCausalLM`: 6 layers, width 192, 6 query heads and 2 key/value heads of 32, MLP of 512,
rotary positions, tied embeddings; bfloat16 weights; byte-level BPE of 2048 tokens in which every
digit is a token. `<|end|>` ends an answer, `<|pad|>` fills batches, and there is no start token.

## Use

A question ends with `Answer:`; the chat template writes the same. The answer starts with the line
break that follows `Answer:`, and the template keeps it as it is. A signature with a docstring is
completed as well.

```text
{dialogue}
```

Both questions are among the training data: this dialogue is known by heart. The figures below are
about functions that are not.

## Figures

`python tools/evaluate_embedded.py [--dtype bfloat16|nf4]` measures, with nats per token and with
greedy decoding:

| weights | library nats | bits/byte | catalogue nats | bits/byte | compile | right | dialogue |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

*Library* is the loss on stretches of 512 tokens from all over the held-out files of the standard
library, without what stands before them; *catalogue* is the loss on 300 held-out documents,
questions included, whose wording is drawn at random. *Compile* and *right* count 100 held-out
prompts; right means the same results, exceptions included, as the reference on its test inputs. In
float32, by kind of prompt:

| prompt | of | compile | right |
| --- | --- | --- | --- |
{kinds}

Of the first {more} held-out prompts, {more_compile} compile and {more_right} are right in float32.

A held-out function ({percent} % of the combinations, chosen by a hash of the body) was never
trained in any wording; its parts were, in other combinations. A few of the bodies are, as text,
those of trained functions as well: terabytes to gigabytes and kilometers to meters can both be
`x * 1000`. The held-out prompts are drawn from the same families as the training data: the figures
say nothing about functions of other kinds.

## Training

```text
{command}
```

made it: {steps} steps, {tokens} tokens, {minutes} minutes on {hardware}. The time is part of
the command, so a faster machine trains on more tokens. Muon trained the matrices, AdamW the rest.
{share} % of the tokens are the sources of the standard library of Python {python}, without its
tests; the others are documents of `tools/catalogue.py`, which generates and runs every function
that it shows. torch {torch}.

## License

The weights are under the Apache License 2.0. They were trained on sources of the CPython {python}
standard library, Copyright © 2001 Python Software Foundation and contributors, which are under the
[PSF License Agreement](https://docs.python.org/3/license.html); some modules carry notices of their
own. The rest of the training data was generated by this repository. `SHA256SUMS` lists the files'
digests; check them with `sha256sum -c SHA256SUMS`.
"""
DRAFT_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [code, python]
---

# Draft of the embedded model

A causal language model of {parameters:.2f} million parameters with the tokenizer of
`recipes://embedded`, made to guess for it in speculative decoding (`decode=assisted`). On its own
it is good for nothing else.

```console
$ engine run tiny-assisted -p "def add(a, b):"
```

`LlamaForCausalLM`: 2 layers, width 96, 3 query heads and 1 key/value head of 32, MLP of 256, rotary
positions, tied embeddings; bfloat16 weights; 512 tokens of context.

## Figures

`python tools/evaluate_embedded.py --draft` measures, in float32:

| library nats | bits/byte | catalogue nats | bits/byte |
| --- | --- | --- | --- |
| {losses} |

Of {drafted} guesses, 4 at a time, the embedded model took {accepted} ({rate:.0f} %) in its answers
to {prompts} held-out prompts: {tokens} tokens in {passes} passes. {equal} of the {prompts} answers
were those that it gives alone. Fewer passes are not always less time:
`python tools/overhead.py --decode assisted decode.draft=recipes://embedded-draft` tells.

## Training

```text
{command}
```

made it from the same data as the embedded model: {steps} steps, {batch} tokens, {minutes} minutes
on {hardware}. torch {torch}, Python {python}.

## License

As that of the embedded model: see `../embedded/README.md`. `SHA256SUMS` lists the files' digests.
"""
LIBRARY_SHARE = 0.28
# The catalogue's questions are drawn at random: there is little to learn in predicting them.
PROMPT_WEIGHT = 0.2


def train_tokenizer(seed: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on equal shares of both parts of the data."""
    library = [path.read_text("utf-8", "replace") for path in catalogue.library_files(False)]
    rng = random.Random(f"tokenizer {seed}")
    size, drawn = sum(map(len, library)), 0
    texts = list(library)
    while drawn < size:
        texts.append(catalogue.training_sample(rng).text.replace(catalogue.END, ""))
        drawn += len(texts[-1])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[catalogue.END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wrap(tokenizer: Tokenizer) -> Any:
    """Give a tokenizer its special tokens and its chat template."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=catalogue.END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Any, draft: bool = False) -> Any:
    """Build the untrained model."""
    width, layers, groups = (96, 2, 1) if draft else (192, 6, 2)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=256 * groups,
        num_hidden_layers=layers,
        num_attention_heads=3 * groups,
        num_key_value_heads=groups,
        head_dim=32,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def encode_library(tokenizer: Any, held_out: bool) -> list[int]:
    """Encode the standard library's sources into one run of tokens."""
    tokens: list[int] = []
    for path in catalogue.library_files(held_out):
        tokens += tokenizer.encode(path.read_text("utf-8", "replace"), verbose=False)
        tokens.append(tokenizer.eos_token_id)
    return tokens


def encode_sample(tokenizer: Any, drawn: catalogue.Sample) -> tuple[list[int], list[float]]:
    """Encode a document segment by segment, as inference does, with a weight per token."""
    tokens: list[int] = []
    weights: list[float] = []
    for place, segment in enumerate(drawn.segments):
        part = tokenizer.encode(segment, verbose=False)
        tokens += part
        weights += [PROMPT_WEIGHT if place % 2 == 0 else 1.0] * len(part)
    return tokens, weights


class Batches:
    """Draw training batches: each depends on the seed and its step alone, so they resume."""

    def __init__(self, tokenizer: Any, seed: int, rows: int) -> None:
        """Encode the standard library once."""
        self.tokenizer, self.seed, self.rows = tokenizer, seed, rows
        self.library = encode_library(tokenizer, held_out=False)

    def row(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        """Draw one row: a window of the library, or catalogue documents from a start on."""
        if rng.random() < LIBRARY_SHARE:
            start = rng.randrange(len(self.library) - length)
            return self.library[start : start + length], [1.0] * length
        tokens: list[int] = []
        weights: list[float] = []
        while len(tokens) < length:
            part, weight = encode_sample(self.tokenizer, catalogue.training_sample(rng))
            tokens += part
            weights += weight
        return tokens[:length], weights[:length]

    def draw(self, step: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the tokens and weights of one step: as many tokens whatever the length."""
        rng = random.Random(f"{self.seed} {step}")
        rows = [self.row(rng, length) for _ in range(self.rows * LENGTH // length)]
        return torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])


def optimizers(model: Any, rate: float) -> list[torch.optim.Optimizer]:
    """Build Muon for the matrices of the layers and AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_at(progress: float, step: int) -> float:
    """Return the factor of the learning rate: a short warm-up, then a cosine to 2 %."""
    return min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, progress))))


def save_model(model: Any, tokenizer: Any, out: Path) -> None:
    """Write the weights in bfloat16, the tokenizer and the checksums."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: value.to("cpu", torch.bfloat16) for name, value in model.state_dict().items()}
    copy: Any = LlamaForCausalLM(model.config)
    copy.to(torch.bfloat16).load_state_dict(state)
    copy.generation_config = model.generation_config
    copy.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    names = ("config.json", "model.safetensors", "tokenizer.json")
    sums = [f"{hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (out / "SHA256SUMS").write_text("".join(sums))


def progress_line(text: str, last: bool = False) -> None:
    """Show progress: over itself on a terminal, now and then elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{text}\x1b[K", end="\n" if last else "", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def train(arguments: argparse.Namespace) -> dict[str, float]:
    """Train to the end of the time or of the steps, with checkpoints, and write the model."""
    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    if arguments.draft:
        shutil.copy(OUT / "tokenizer.json", work)
    elif not (work / "tokenizer.json").exists():
        train_tokenizer(arguments.seed).save(str(work / "tokenizer.json"))
    tokenizer = wrap(Tokenizer.from_file(str(work / "tokenizer.json")))
    model = build_model(tokenizer, arguments.draft).to(device)
    tools = optimizers(model, arguments.rate)
    batches = Batches(tokenizer, arguments.seed, arguments.rows)
    step, before = 0, 0.0
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        model.load_state_dict(saved["model"])
        for tool, state in zip(tools, saved["optimizers"], strict=True):
            tool.load_state_dict(state)
        step, before = saved["step"], saved["seconds"]

    def store(seconds: float) -> None:
        states = [tool.state_dict() for tool in tools]
        parts = {"model": model.state_dict(), "optimizers": states}
        torch.save({**parts, "step": step, "seconds": seconds}, work / "checkpoint.tmp")
        (work / "checkpoint.tmp").replace(checkpoint)

    started = stored = shown = time.monotonic()
    low = torch.autocast(device.type, torch.bfloat16) if arguments.bf16 else nullcontext()
    model.train()
    while True:
        now = time.monotonic()
        seconds = before + now - started
        progress = step / arguments.steps if arguments.steps else seconds / arguments.minutes / 60
        if progress >= 1:
            break
        factor = rate_at(progress, step)
        for tool in tools:
            for group in tool.param_groups:
                group["lr"] = arguments.rate * factor
        length = SHORT if progress < SHORT_UNTIL else LENGTH
        if device.type == "cpu":
            model.set_attn_implementation("eager" if length == SHORT else "sdpa")
        tokens, weights = (part.to(device) for part in batches.draw(step, length))
        with low:
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(
            logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
        )
        weights = weights[:, 1:].flatten()
        loss = (loss * weights).sum() / weights.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for tool in tools:
            tool.step()
            tool.zero_grad(set_to_none=True)
        step += 1
        if now - shown > (1 if sys.stderr.isatty() else 20):
            shown = now
            done = step * arguments.rows * LENGTH
            progress_line(
                f"step {step}, {progress:.1%}, loss {loss.item():.3f}, {done / 1e6:.2f} M tokens, "
                f"{done / seconds:.0f} tokens/s"
            )
        if now - stored > arguments.every:
            stored = now
            store(seconds)
    seconds = before + time.monotonic() - started
    store(seconds)
    progress_line(f"trained {step} steps in {seconds / 60:.1f} minutes", last=True)
    save_model(model, tokenizer, arguments.out)
    return {"steps": step, "tokens": step * arguments.rows * LENGTH, "seconds": seconds}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--minutes", type=float, default=60.0, help="time to train for")
    parser.add_argument("--steps", type=int, default=0, help="steps to train for, not minutes")
    parser.add_argument("--rows", type=int, default=64 if gpu else 8, help="rows per step")
    parser.add_argument("--rate", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, default=120.0, help="seconds between checkpoints")
    parser.add_argument("--no-bf16", dest="bf16", action="store_false", help="compute in float32")
    parser.add_argument("--draft", action="store_true", help="train the smaller draft model")
    parser.add_argument("--out", type=Path, help="where to write the model")
    parser.add_argument(
        "--work",
        type=Path,
        help="where to keep the tokenizer and the checkpoint; remove it to start afresh",
    )
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out or (DRAFT_OUT if arguments.draft else OUT)
    arguments.work = arguments.work or Path(tempfile.gettempdir()) / f"recipe-{arguments.out.name}"
    return arguments


def processor() -> str:
    """Return the name of the processor, as far as the system tells it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_card(arguments: argparse.Namespace, took: dict[str, float]) -> str:
    """Measure the written model in every data type and write its card."""
    kinds = ["float32", "bfloat16"]
    kinds += ["nf4"] if importlib.util.find_spec("bitsandbytes") else []
    found = {kind: evaluate_embedded.evaluate(arguments.out, kind) for kind in kinds}

    more = evaluate_embedded.evaluate(arguments.out, "float32", MORE_PROMPTS)

    def row(kind: str, figures: dict[str, Any]) -> str:
        losses = [
            f"{figures[part]['nats_per_token']:.3f} | {figures[part]['bits_per_byte']:.3f}"
            for part in ("library", "catalogue")
        ]
        guide = "right" if all(figures["guide"]["right"]) else "wrong"
        counts = f"{figures['compile']} | {figures['right']} | {guide}"
        return f"| {kind} | {' | '.join(losses)} | {counts} |"

    on = torch.cuda.get_device_name() if arguments.device == "cuda" else processor()
    limit = f"--steps {arguments.steps}" if arguments.steps else f"--minutes {arguments.minutes:g}"
    tallies = found["float32"]["by_kind"]
    text = CARD.format(
        command=f"python tools/train_embedded.py {limit} --seed {arguments.seed}",
        steps=f"{took['steps']:.0f}",
        tokens=f"{took['tokens'] / 1e6:.1f} million",
        share=f"{LIBRARY_SHARE * 100:.0f}",
        minutes=f"{took['seconds'] / 60:.0f}",
        hardware=f"{on}, {arguments.threads} thread{'s' * (arguments.threads > 1)}",
        python=platform.python_version(),
        torch=torch.__version__,
        rows="\n".join(row(kind, figures) for kind, figures in found.items()),
        kinds="\n".join(
            f"| {kind} | {tally['prompts']} | {tally['compile']} | {tally['right']} |"
            for kind, tally in tallies.items()
        ),
        dialogue=found["float32"]["guide"]["text"].strip(),
        percent=catalogue.HELD_OUT_PERCENT,
        more=MORE_PROMPTS,
        more_compile=more["compile"],
        more_right=more["right"],
    )
    (arguments.out / "README.md").write_text(text)
    return text


def write_draft_card(arguments: argparse.Namespace, took: dict[str, float]) -> str:
    """Measure the written draft and write its card."""
    found = evaluate_embedded.drafting(arguments.out, 100)
    losses = [
        f"{found[part]['nats_per_token']:.3f} | {found[part]['bits_per_byte']:.3f}"
        for part in ("library", "catalogue")
    ]
    limit = f"--steps {arguments.steps}" if arguments.steps else f"--minutes {arguments.minutes:g}"
    text = DRAFT_CARD.format(
        **{name: found[name] for name in ("drafted", "accepted", "prompts", "passes", "equal")},
        tokens=found["tokens"],
        parameters=found["parameters"] / 1e6,
        losses=" | ".join(losses),
        rate=100 * found["accepted"] / found["drafted"],
        command=f"python tools/train_embedded.py --draft {limit} --seed {arguments.seed}",
        steps=f"{took['steps']:.0f}",
        batch=f"{took['tokens'] / 1e6:.1f} million",
        minutes=f"{took['seconds'] / 60:.0f}",
        hardware=processor(),
        torch=torch.__version__,
        python=platform.python_version(),
    )
    (arguments.out / "README.md").write_text(text)
    return text


def main() -> None:
    """Train the model, measure it and print its card."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    card = write_draft_card if arguments.draft else write_card
    print(card(arguments, train(arguments)))


if __name__ == "__main__":
    main()
