"""Print the figures of the guide "Optimizing LLMs for Speed and Memory" beside those of the plan.

    .venv/bin/python tools/guide.py

Nothing loads: the plan knows the shapes of the guide's models (`engine list model`). What the guide
calls GB is 10^9 bytes for weights, and 2^30 where it measured. tools/gpu_guide.py measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from engine.attending import costs
from engine.contexts import EstimateContext
from engine.planning.planner import Plan, plan
from engine.recipe import compose
from engine.shape import ModelShape, read_shape

GB, GIB = 10**9, 2**30
PROMPT = 20
"""Tokens of the guide's short prompt, about; its answers had 60."""
NEW = 60

WEIGHTS = {
    "gpt-3": 350, "bloom": 352, "llama-2-70b": 140, "falcon-40b": 80, "mpt-30b": 60,
    "starcoder": 31,
}  # fmt: skip

PEAKS = {
    "bfloat16": (29.026, ("model.dtype=bfloat16",)),
    "8 bits": (15.219, ("model.dtype=float16", "quantize=bitsandbytes", "quantize.bits=8")),
    "4 bits (fp4)": (
        9.544,
        (
            "model.dtype=float16", "quantize=bitsandbytes", "quantize.quant_type=fp4",
            "quantize.compute_dtype=float32",
        ),
    ),
}  # fmt: skip
"""Peak that the guide measured with OctoCoder, and the recipe for what it loaded."""


@dataclass(frozen=True)
class Row:
    """A figure of the guide, and the plan's."""

    what: str
    guide: float
    ours: float
    unit: str
    note: str = ""

    @property
    def difference(self) -> float:
        """Return how far the plan is from the guide."""
        return self.ours / self.guide - 1


def planned(model: str, *words: str) -> Plan:
    """Plan one of the guide's models for its GPU, a 40 GB A100."""
    workload = (f"workload.prompt_tokens={PROMPT}", f"decode.max_new_tokens={NEW}")
    return plan(compose("base", [f"model={model}", "target=a100-40gb", *workload, *words]))


def rows() -> Iterator[Row]:
    """Yield every figure of the guide that a plan can tell."""
    for model, guide in WEIGHTS.items():
        size = planned(model, "model.dtype=bfloat16").prompt.held["weights"] / GB
        note = "by its name; it has 41.3 billion" if model == "falcon-40b" else ""
        yield Row(f"weights of {model} in bfloat16", guide, size, "GB", note)
    for name, (peak, words) in PEAKS.items():
        found = planned("octocoder", *words).peak.tensor_bytes / GIB
        yield Row(f"peak of OctoCoder in {name}", peak, found, "GiB")
    octocoder = planned("octocoder")
    for tokens, asked, note in (
        (1_000, 50e-3, "the guide says 'around 50 MB'; its own formula gives 80 MB"),
        (16_000, 19, "the guide means 2^30"),
        (100_000, 1000, "the guide says 'almost 1 TB'"),
    ):
        yield Row(
            f"eager scores of 40 heads, {tokens:,} tokens, one matrix in bfloat16",
            asked,
            one_matrix(octocoder, heads=40, tokens=tokens) / (GIB if tokens == 16_000 else GB),
            "GiB" if tokens == 16_000 else "GB",
            note,
        )
    every_head = read_shape({**octocoder.shape.config, "multi_query": False})
    values = float(every_head.kv_values_kept(16_000))
    yield Row("KV cache of 16,000 tokens, a head each", 7_864_320_000, values, "values")
    one = octocoder.shape.kv_values_kept(16_000) * 2 / 1e6
    yield Row("KV cache of 16,000 tokens, one head for all", 400, one, "MB", "'less than 400 MB'")


def one_matrix(octocoder: Plan, *, heads: int, tokens: int) -> int:
    """Return the bytes of one matrix of scores, which eager attention has more than one of."""
    shape: ModelShape = replace(octocoder.shape, heads=heads)
    context = EstimateContext(
        recipe=octocoder.recipe, shape=shape, target=octocoder.target, batch=1, tokens=tokens,
        new=tokens,
    )  # fmt: skip
    return costs.scores(context) * context.value_bytes


def table(found: list[Row]) -> Table:
    """Return the rows for people."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column("figure", overflow="fold")
    for title in ("guide", "plan", "difference"):
        made.add_column(title, justify="right", no_wrap=True)
    made.add_column("", overflow="fold")
    for row in found:
        made.add_row(
            row.what,
            _shown(row.guide, row.unit),
            _shown(row.ours, row.unit),
            f"{row.difference:+.1%}",
            row.note,
        )
    return made


def _shown(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


if __name__ == "__main__":
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 150
    console.print(table(list(rows())))
