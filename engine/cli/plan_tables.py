"""Plans as tables and sentences, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.table import Table

from engine.planning.planner import Plan
from engine.planning.scoring import summary
from engine.planning.suggesting import Suggestion
from engine.target import is_here

GIB = 2**30
SMALL = 2 * GIB
"""What is less than this is told in MiB."""


def console() -> Console:
    """Return a console for tables, wide where nobody looks at it."""
    made = Console(highlight=False, markup=False)
    if not made.is_terminal:
        made.width = 130
    return made


def show(found: Plan, suggestions: list[Suggestion]) -> None:
    """Print one plan: memory, reach, speed, and what would make it fit."""
    out = console()
    out.print(headline(found))
    out.print(memory(found))
    for line in (*reach(found), *speed(found)):
        out.print(line)
    if is_here(found.target):
        out.print(record(found))
    for note in found.notes:
        out.print(f"note: {note}")
    if suggestions:
        out.print()
        out.print("it fits with:")
        out.print(changes(suggestions))
    elif found.fits is False and not found.refused:
        out.print(
            "no change of quantize, cache or attention makes it fit, nor does another known target "
            f"of this kind ({found.target.kind}): model=NAME of a smaller one (engine list model)"
        )


def headline(found: Plan) -> str:
    """Return the verdict in one line."""
    usable, parameters = found.target.usable_bytes, found.shape.parameters
    dtype = found.token.context.dtype
    size = "" if parameters is None else f"{_counted(parameters)} weights, "
    what = f"{found.recipe.name}: {found.recipe.model.path} ({size}{dtype}) on {found.target.name}"
    told = verdict(found)
    if usable is None:
        peak = f"{_gib(found.peak_bytes)} at its peak; what the target has is not known"
        return f"{what}: {told}, {peak}" if told else f"{what}: {peak}"
    return f"{what}: {told}, {_gib(found.peak_bytes)} of {_gib(usable)}"


def verdict(found: Plan) -> str:
    """Return whether it fits, or is refused; '' where what the target has is not known."""
    if found.refused:
        return "REFUSED"
    if found.fits is None:
        return ""
    return "does NOT fit" if not found.fits else "fits narrowly" if found.tight else "fits"


def memory(found: Plan) -> Table:
    """Return the table of terms: of the prompt's pass, and of the last token's."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    sequences = f"{found.batch} x " if found.batch > 1 else ""
    unit, name = (GIB, "GiB") if found.peak_bytes >= SMALL else (GIB // 1024, "MiB")
    table.add_column(
        f"{name} for {sequences}{found.prompt_tokens:,} + {found.new_tokens:,} tokens", min_width=36
    )
    table.add_column("prompt", justify="right")
    table.add_column("last token", justify="right")
    columns = (found.prompt, found.token)
    for kind in ("held", "passing"):
        names = dict.fromkeys(name for each in columns for name in getattr(each, kind))
        for name in names:
            sizes = [_number(getattr(each, kind).get(name, 0), unit) for each in columns]
            if any(sizes):
                table.add_row(f"  {name}", *sizes)
    table.add_row("  runtime reserve", *(_number(each.reserve, unit) for each in columns))
    table.add_row("together", *(_number(each.peak_bytes, unit) for each in columns), style="bold")
    return table


def reach(found: Plan) -> Iterator[str]:
    """Yield how far the target's memory goes."""
    if found.target.usable_bytes is None:
        return
    longest, most = found.longest_context, found.largest_batch
    end = found.shape.max_positions
    if longest is None:
        told = "nothing limits it"
    elif longest == 0:
        told = "none fits"
    else:
        by = "the model's end" if longest == end else "by memory"
        if longest == found.pricer.limit != end:
            by = "the cache's end"
        told = f"{longest:,} tokens, {by}"
    batch = "nothing limits it" if most is None else "none fits" if not most else f"{most:,}"
    yield f"longest context: {told} · largest batch: {batch}"


def speed(found: Plan) -> Iterator[str]:
    """Yield what the speed will be, and why."""
    rates, rate, first = found.pricer.rates, found.tokens_per_second, found.time_to_first_token
    if rates is None or rate is None or first is None:
        yield (
            f"speed: not known of {found.target.name}: `engine calibrate` measures this machine; "
            "of another one, target.bandwidth_gbs and target.tflops tell"
        )
        return
    best = "" if found.at_best is None else f", {_rate(found.at_best)} if all drafts were right"
    binds = found.binds
    yield (
        f"decoding: {_rate(rate)} tokens/s{best} (limited by {binds['decode']}) · "
        f"first token after {_seconds(first)} (by {binds['prefill']})"
    )
    for what, advice in found.advice.items():
        yield f"  {what}: {advice}"
    yield f"  by {rates.origin}"


def record(plan: Plan) -> str:
    """Say how far plans of this machine were off so far."""
    found = summary(plan.recipe)
    if not found["runs"]:
        return "no run here has been held against its plan yet"
    words = {
        "tokens_per_second": "tokens/s",
        "time_to_first_token": "first token",
        "peak_memory_bytes": "peak",
    }
    parts = [f"{word} {found[name]:.0%}" for name, word in words.items() if name in found]
    whose = "these" if found["same"] else "other"
    return (
        f"plans of {found['runs']:,} runs with {whose} choices here were off by (median): "
        f"{', '.join(parts)}"
    )


def changes(suggestions: list[Suggestion]) -> Table:
    """Return the table of what makes it fit, best first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("change")
    for title in ("peak", "tokens/s"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("costs")
    for each in suggestions:
        rate = each.plan.tokens_per_second
        table.add_row(
            "  " + " ".join(each.overrides),
            _gib(each.plan.peak_bytes),
            "" if rate is None else _rate(rate),
            each.costs,
        )
    return table


def compare(plans: Mapping[str, Plan]) -> None:
    """Print several plans side by side, and why some are refused."""
    out = console()
    out.print(comparison(plans))
    for name, found in plans.items():
        for problem in found.verdict.problems if found.refused else ():
            out.print(f"{name}: {problem.message}; {problem.hint}")


def comparison(plans: Mapping[str, Plan]) -> Table:
    """Return the table of several plans."""
    targets = {found.target.name for found in plans.values()}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("plan" if len(targets) > 1 else f"on {targets.pop()}", overflow="fold")
    for title in ("weights", "KV cache", "peak", "usable"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict")
    for title in ("longest", "batch", "tokens/s", "first token"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, found in plans.items():
        held, usable = found.token.held, found.target.usable_bytes
        rate, first = found.tokens_per_second, found.time_to_first_token
        table.add_row(
            name if len(targets) < 2 or "target=" in name else f"{name} on {found.target.name}",
            _gib(found.token.weight_bytes),
            _gib(sum(size for term, size in held.items() if "KV" in term)),
            _gib(found.peak_bytes),
            "" if usable is None else _gib(usable),
            verdict(found),
            "" if found.longest_context is None else f"{found.longest_context:,}",
            "" if found.largest_batch is None else f"{found.largest_batch:,}",
            "" if rate is None else _rate(rate),
            "" if first is None else _seconds(first),
        )
    return table


def _counted(number: int) -> str:
    return f"{number / 1e9:.3g} billion" if number >= 1e9 else f"{number / 1e6:.3g} million"


def _rate(rate: float) -> str:
    return f"{rate:,.1f}" if rate >= 1 else f"{rate:.2g}"


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= SMALL else f"{size / GIB * 1024:,.1f} MiB"


def _number(size: int, unit: int) -> str:
    """Return what can be seen of a size in this unit."""
    found = f"{size / unit:,.3f}"
    return "" if found == "0.000" else found


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"
