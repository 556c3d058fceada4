"""Draw the loss against the position, within and beyond the context that a model was trained on.

python tools/extrapolate.py [--texts N] [--svg FILE] [--json]
python tools/extrapolate.py --growing [--texts N]

The embedded model, trained on 512 tokens, reads held-out files of the standard library: their first
512, 1024, 2048 and 4096 tokens, once for each way to encode positions. With --growing it reads them
token by token, by dynamic NTK, with a cache and recomputing all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import catalogue  # type: ignore[import-not-found]
import torch

import engine
from engine import registry

TRAINED = 512
TIMES = (1, 2, 4, 8)
BUCKET = 128
"""Positions whose losses make one point of the drawing."""

FACTOR = TIMES[-1]
CHOICES = {
    "none": ["position_encoding=native"],
    "linear": ["position_encoding=linear", f"position_encoding.factor={FACTOR}"],
    "NTK (dynamic)": [
        "position_encoding=dynamic",
        f"position_encoding.factor={FACTOR}",
        "cache=none",
    ],
    "YaRN": ["position_encoding=yarn", f"position_encoding.factor={FACTOR}"],
    "self-extend": [
        "position_encoding=self-extend",
        "position_encoding.window=256",
        f"position_encoding.group_size={2 * FACTOR}",
        "attention=chunked",
    ],
}
BEGUN, GROWN, EVERY = 400, 1200, 8
"""Tokens of a prompt, and of the text that it grows to; how many pass from one look to the next."""

COLORS = ("#555555", "#d95f02", "#1b9e77", "#7570b3", "#e7298a")


def texts(tokenizer: Any, count: int) -> torch.Tensor:
    """Return the beginnings of held-out files, `[count, tokens]`: one token more than is read."""
    found: list[list[int]] = []
    for path in catalogue.library_files(held_out=True):
        ids = tokenizer.encode(path.read_text("utf-8", "replace"), verbose=False)
        if len(ids) > TRAINED * FACTOR:
            found.append(ids[: TRAINED * FACTOR + 1])
        if len(found) == count:
            break
    return torch.tensor(found)


@torch.inference_mode()
def losses(model: Any, rows: torch.Tensor, tokens: int) -> list[float]:
    """Return the loss at each position of texts of so many tokens, mean of the texts."""
    total = torch.zeros(tokens)
    for row in rows:
        logits = model(input_ids=row[None, :tokens], use_cache=False).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, row[1 : tokens + 1], reduction="none")
    mean: list[float] = (total / len(rows)).tolist()
    return mean


def measure(count: int) -> dict[str, Any]:
    """Return, for each choice, the loss of the last tokens per length, and the longest curve."""
    found: dict[str, Any] = {}
    for name, words in CHOICES.items():
        choice = words[0].partition("=")[2]
        if choice not in registry.installed()["position_encoding"]:
            found[name] = {"note": f"position_encoding={choice} is not installed"}
            continue
        recipe = engine.compose(
            "base", ["model.path=recipes://embedded", "model.dtype=float32", *words]
        )
        with engine.build(recipe) as session:
            rows = texts(session.tokenizer, count)
            runs = {times: losses(session.model, rows, TRAINED * times) for times in TIMES}
        longest = runs[FACTOR]
        found[name] = {
            "texts": len(rows),
            "loss of the last 512 tokens": {
                str(TRAINED * times): mean(run[-TRAINED:]) for times, run in runs.items()
            },
            "loss by position": [
                mean(longest[start : start + BUCKET]) for start in range(0, len(longest), BUCKET)
            ],
        }
    return found


@torch.inference_mode()
def likelihoods(session: Any, row: torch.Tensor) -> torch.Tensor:
    """Return log probabilities of what follows, of each text looked at that is beyond the trained.

    Token by token where the session keeps a cache.
    """
    cache = session.new_cache(1, GROWN).cache
    found = []
    for tokens in range(BEGUN, GROWN):
        look = tokens > TRAINED and tokens % EVERY == 0
        if cache is None and not look:
            continue
        held = 0 if cache is None else int(cache.get_seq_length())
        logits = session.model(
            input_ids=row[None, held:tokens],
            attention_mask=torch.ones(1, tokens, dtype=torch.long),
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits[0, -1]
        if look:
            found.append(logits.float().log_softmax(-1))
    return torch.stack(found)


def growing(count: int) -> str:
    """Return, as a line of text, how far a cache is from recomputing."""
    found = {}
    following = torch.tensor([n for n in range(TRAINED + 1, GROWN) if n % EVERY == 0])
    for keeper in ("none", "dynamic"):
        words = ["model.path=recipes://embedded", "model.dtype=float32", *CHOICES["NTK (dynamic)"]]
        recipe = engine.compose("base", [*words[:-1], f"cache={keeper}"])
        with engine.build(recipe) as session:
            rows = texts(session.tokenizer, count)
            found[keeper] = torch.stack([likelihoods(session, row) for row in rows])
    losses = {
        keeper: -float(likely.gather(2, rows[:, following, None]).mean())
        for keeper, likely in found.items()
    }
    same = (found["none"].argmax(-1) == found["dynamic"].argmax(-1)).float().mean()
    return (
        f"loss beyond {TRAINED} tokens, of texts that grow from {BEGUN} to {GROWN}: "
        f"{losses['dynamic']:.3f} with a cache, {losses['none']:.3f} recomputed; "
        f"the same likeliest token at {float(same):.3f} of {found['none'].shape[:2].numel()} places"
    )


def mean(values: list[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)


def table(found: dict[str, Any]) -> str:
    """Return the losses as lines of text."""
    lengths = [str(TRAINED * times) for times in TIMES]
    lines = [f"{'tokens of text':>16}" + "".join(f"{length:>8}" for length in lengths)]
    for name, figures in found.items():
        if "note" in figures:
            lines.append(f"{name:>16}  {figures['note']}")
            continue
        by_length = figures["loss of the last 512 tokens"]
        lines.append(f"{name:>16}" + "".join(f"{by_length[length]:8.3f}" for length in lengths))
    return "\n".join(lines)


def drawing(found: dict[str, Any]) -> str:
    """Return the curves of the longest texts as a picture, in SVG."""
    width, height, left, top = 640, 360, 50, 30
    curves: dict[str, list[float]] = {
        name: figures["loss by position"]
        for name, figures in found.items()
        if "note" not in figures
    }
    high = max(max(curve) for curve in curves.values())
    low = min(min(curve) for curve in curves.values())

    def x(position: float) -> float:
        return left + position / (TRAINED * FACTOR) * width

    def y(loss: float) -> float:
        return top + float((high - loss) / (high - low)) * height

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 150} '
        f'{top + height + 45}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="18">loss (nats per token) by position, trained on {TRAINED}</text>',
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>',
    ]
    for times in TIMES:
        place = x(TRAINED * times)
        parts += [
            f'<line x1="{place}" y1="{top}" x2="{place}" y2="{top + height}" stroke="#ddd"/>',
            f'<text x="{place}" y="{top + height + 18}" text-anchor="middle">'
            f"{TRAINED * times}</text>",
        ]
    for loss in (low, (low + high) / 2, high):
        parts.append(f'<text x="{left - 6}" y="{y(loss) + 4}" text-anchor="end">{loss:.1f}</text>')
    for index, (name, curve) in enumerate(curves.items()):
        points = " ".join(
            f"{x((place + 0.5) * BUCKET):.1f},{y(loss):.1f}" for place, loss in enumerate(curve)
        )
        color, line = COLORS[list(CHOICES).index(name)], top + 20 + 20 * index
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>',
            f'<text x="{left + width + 12}" y="{line}" fill="{color}">{name}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Print the figures, and draw them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=8, help="held-out files to read")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--svg", type=Path, help="file for the drawing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--growing", action="store_true", help="dynamic NTK token by token")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.growing:
        print(growing(arguments.texts))
        return
    found = measure(arguments.texts)
    if arguments.svg is not None:
        arguments.svg.write_text(drawing(found), "utf-8")
    print(json.dumps(found, indent=2) if arguments.json else table(found))


if __name__ == "__main__":
    main()
