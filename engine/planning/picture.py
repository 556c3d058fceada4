"""Draw plans: memory by term against length, with what the target has, side by side."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import Problem, RecipeError

if TYPE_CHECKING:
    from engine.planning.planner import Plan

GIB = 2**30
POINTS = 9
"""Lengths that are drawn, each twice the one before."""

FALLBACK = 131_072
"""Where the drawing ends of a model that has no end."""

COLUMNS = 3
"""Plans beside each other; more go below."""

SMALL = 0.01
"""Share of the drawing's height below which a term is drawn with the others."""

FAR = 4
"""How many times more than the tallest bar a target may have, and still be drawn."""

BEYOND = 1.5
"""How many times the target's memory is drawn at most: bars that go on are cut, and say how far."""

ORDER = (
    "weights", "packed weights", "scales", "KV cache", "KV cache of sliding layers",
    "scores of attention", "activations", "workspace of products", "logits", "attention", "mask",
)  # fmt: skip
"""Terms that have the same colour in every drawing, from the bottom up."""

LAST = ("runtime reserve", "others")

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>engine plan</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #1a1a1a; background: #fff }}
figure {{ margin: 0 0 2rem; overflow-x: auto }} svg {{ max-width: 100%; height: auto }}
table {{ border-collapse: collapse; margin: 0 0 2rem }}
caption {{ text-align: left; font-weight: 600; padding: .3rem 0 }}
th, td {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }} .over {{ color: #b00020; font-weight: 600 }}
</style>
<h1>engine plan</h1>
<figure>{drawing}</figure>
{tables}
</html>
"""


def refuse(file: Path) -> None:
    """Refuse what cannot be drawn, before anything is planned.

    Raises RecipeError for a file that is no .png or .html, without its folder, or matplotlib.
    """
    if file.suffix not in (".png", ".html"):
        raise _refused(f"--plot {file}: a picture is a .png or .html", "--plot memory.html")
    if not file.parent.is_dir():
        raise _refused(
            f"--plot {file}: there is no folder {file.parent}", f"mkdir -p {file.parent}"
        )
    if find_spec("matplotlib") is None:
        message = "--plot needs matplotlib, which is not installed"
        raise _refused(message, 'pip install "recipe-engine[plot]"')


def draw(plans: Mapping[str, Plan], file: Path) -> None:
    """Draw plans into a .png or .html file.

    Raises RecipeError when it cannot be written.
    """
    series = {name: memory_by_length(found) for name, found in plans.items()}
    buffer = io.BytesIO()
    figure = _figure(plans, series)
    kind = "png" if file.suffix == ".png" else "svg"
    figure.savefig(buffer, format=kind, dpi=150, bbox_inches="tight", metadata={"Date": None})
    content = buffer.getvalue()
    if kind == "svg":
        drawing = content.decode("utf-8")
        drawing = drawing[drawing.index("<svg") :]
        tables = "\n".join(_table(name, plans[name], series[name]) for name in plans)
        content = PAGE.format(drawing=drawing, tables=tables).encode("utf-8")
    try:
        file.write_bytes(content)
    except OSError as error:
        raise _refused(f"--plot {file}: {error.strerror}", "--plot memory.html") from error


def memory_by_length(found: Plan) -> dict[int, Mapping[str, int]]:
    """Return the bytes by name for texts of several lengths, as far as model and cache go.

    The length that the recipe asks for is among them.
    """
    end = found.pricer.limit or FALLBACK
    lengths = sorted({asked(found), *(max(end >> shift, 2) for shift in range(POINTS))})
    drawn: dict[int, Mapping[str, int]] = {}
    for length in lengths:
        new = min(found.new_tokens, max(length // 2, 1))
        passes = (
            found.pricer.prompt(found.batch, length - new, new),
            found.pricer.token(found.batch, length - new, new),
        )
        drawn[length] = max(passes, key=lambda each: each.peak_bytes).bytes
    return drawn


def asked(found: Plan) -> int:
    """Return the tokens of the recipe's prompt and answer."""
    return found.prompt_tokens + found.new_tokens


def _figure(plans: Mapping[str, Plan], series: Mapping[str, dict[int, Mapping[str, int]]]) -> Any:
    from matplotlib.figure import Figure

    top = _top(plans, series)
    merged = _merged(series, SMALL * top)
    colors = _colors(_names(terms for drawn in merged.values() for terms in drawn.values()))
    columns = min(len(plans), COLUMNS)
    rows = -(-len(plans) // columns)
    figure = Figure(figsize=(1 + 4.5 * columns, 4.5 * rows))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=len(plans) > 1)
    axes = [axis for row in grid for axis in row]
    for axis in axes[len(plans) :]:
        axis.set_axis_off()
    for axis, (label, found) in zip(axes, plans.items(), strict=False):
        drawn = merged[label]
        ticks = [f"{length:,}{' asked' if length == asked(found) else ''}" for length in drawn]
        below = [0.0] * len(drawn)
        for name, color in colors.items():
            heights = [terms.get(name, 0) / GIB for terms in drawn.values()]
            axis.bar(ticks, heights, bottom=below, color=color, label=name, width=0.8)
            below = [low + height for low, height in zip(below, heights, strict=True)]
        for tick, height in enumerate(below):
            if height * GIB > top:
                axis.annotate(
                    f"{height:,.0f}", (tick, top / GIB), rotation=90, ha="center", va="top",
                    fontsize=8, xytext=(0, -3), textcoords="offset points",
                )  # fmt: skip
        axis.set_ylim(0, 1.05 * top / GIB)
        usable = found.target.usable_bytes
        if usable is not None:
            told, height = f"{found.target.name}: {usable / GIB:.1f} GiB", usable
            if usable > top:
                told, height = f"{told}, far above", top
            else:
                axis.axhline(usable / GIB, color="#b00020", linestyle="--", linewidth=1.5)
            axis.annotate(
                told, (0.02, height / GIB), xycoords=("axes fraction", "data"), color="#b00020",
                xytext=(0, 3), textcoords="offset points", va="bottom", fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )  # fmt: skip
        title = label if len(plans) > 1 else f"{label} on {found.target.name}"
        axis.set_title(title, fontsize=10, parse_math=False)
        axis.set_xlabel("tokens of prompt and answer")
        axis.tick_params(axis="x", rotation=45)
        axis.spines[["top", "right"]].set_visible(False)
    for row in grid:
        row[0].set_ylabel("GiB at the peak")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False
    )
    figure.tight_layout()
    return figure


def _top(plans: Mapping[str, Plan], series: Mapping[str, dict[int, Mapping[str, int]]]) -> float:
    """Return the bytes at the upper end of the drawing."""
    tallest = max(sum(terms.values()) for drawn in series.values() for terms in drawn.values())
    usable = max(found.target.usable_bytes or 0 for found in plans.values())
    if not usable or usable > FAR * tallest:
        return tallest
    shortest = min(sum(next(iter(drawn.values())).values()) for drawn in series.values())
    return max(min(tallest, BEYOND * max(usable, shortest)), usable)


def _merged(
    series: Mapping[str, Mapping[int, Mapping[str, int]]], least: float
) -> dict[str, dict[int, dict[str, int]]]:
    """Put terms together that nobody would see."""
    all_terms = [terms for drawn in series.values() for terms in drawn.values()]
    seen = {name for terms in all_terms for name, size in terms.items() if size >= least}
    return {
        label: {
            length: {name: size for name, size in terms.items() if name in seen}
            | {"others": sum(size for name, size in terms.items() if name not in seen)}
            for length, terms in drawn.items()
        }
        for label, drawn in series.items()
    }


def _colors(names: list[str]) -> dict[str, Any]:
    """Return a colour for each term: the same in every drawing for those that are known."""
    from matplotlib import colormaps

    palette = colormaps["tab20"]
    known = dict(zip((*ORDER, *LAST), map(palette, range(20)), strict=False))
    rest = iter(map(palette, range(len(known), 20)))
    return {name: known.get(name) or next(rest, palette(19)) for name in names}


def _names(series: Iterable[Mapping[str, int]]) -> list[str]:
    """Return the names of all terms: weights at the bottom, what the process takes at the top."""
    found = list(dict.fromkeys(name for terms in series for name in terms))
    first = [name for name in ORDER if name in found]
    last = [name for name in LAST if name in found]
    return [*first, *(name for name in found if name not in (*first, *last)), *last]


def _table(label: str, found: Plan, drawn: Mapping[int, Mapping[str, int]]) -> str:
    names = _names(drawn.values())
    usable = found.target.usable_bytes
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = []
    for length, terms in drawn.items():
        peak = sum(terms.values())
        over = ' class="over"' if usable is not None and peak > usable else ""
        cells = "".join(f"<td>{terms.get(name, 0) / GIB:.3f}</td>" for name in names)
        rows.append(f"<tr{over}><td>{length:,}</td>{cells}<td>{peak / GIB:.3f}</td></tr>")
    has = "" if usable is None else f", {usable / GIB:.2f} GiB usable"
    caption = html.escape(f"{label} on {found.target.name}{has}: GiB by tokens")
    return (
        f"<table><caption>{caption}</caption><tr><th>tokens</th>{head}<th>peak</th></tr>"
        f"{''.join(rows)}</table>"
    )


def _refused(message: str, hint: str) -> RecipeError:
    return RecipeError(Problem(message=message, hint=hint, code="plot"))
