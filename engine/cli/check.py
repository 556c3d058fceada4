"""`engine check`: a verdict before anything loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from engine.cli import common

if TYPE_CHECKING:
    from engine.verdict import Verdict


def check(arguments: common.Arguments = None, json: common.Json = False) -> None:
    """Say whether a recipe can work, and what to type instead if not. Loads nothing.

    engine check tiny-4bit-gqa

    engine check llama-3.1-8b-nf4-t4 target=rtx3090
    """
    from engine.errors import EngineError
    from engine.verdict import check as judge

    try:
        verdict = judge(common.compose(arguments))
    except EngineError as error:
        if not json:
            raise
        problems = [problem.as_dict() for problem in error.problems]
        common.print_json({"ok": False, "problems": problems})
        raise typer.Exit(error.exit_code) from error
    if json:
        common.print_json(
            {
                "ok": verdict.ok,
                "problems": [problem.as_dict() for problem in verdict.problems],
                "recipe": verdict.recipe.name,
                "choices": verdict.recipe.choices,
                "target": verdict.target.name,
                "notes": verdict.notes,
                "terms": dict(verdict.pricer.peak().bytes) if verdict.pricer else {},
                "shape_known": verdict.shape is not None,
            }
        )
        if not verdict.ok:
            raise typer.Exit(verdict.error.exit_code)
        return
    verdict.raise_for_problems()
    _print(verdict)
    for note in verdict.notes:
        print(f"note: {note}")


def _print(verdict: Verdict) -> None:
    recipe, shape, target = verdict.recipe, verdict.shape, verdict.target
    choices = {slot: choice for slot, choice in recipe.choices.items() if slot != "target"}
    listed = "  " + " ".join(f"{slot}={choice}" for slot, choice in choices.items())
    if shape is None:
        print(
            f"ok so far: {recipe.name} for {target.name}. Whether the model has what the choices "
            f"need, and whether it fits, was NOT checked: {recipe.model.path} is not on this "
            f"machine yet\n{listed}"
        )
        return
    print(f"ok: {recipe.name} for {target.name}\n{listed}")
    print(
        f"  {shape.model_type}: {shape.layers} layers, hidden {shape.hidden_size}, "
        f"{shape.heads} heads on {shape.kv_heads}, vocabulary {shape.vocab_size:,}"
    )
    if verdict.pricer is not None:
        peak = verdict.pricer.peak()
        for name, size in peak.bytes.items():
            print(f"  {name}: {size:,} bytes")
        usable = "" if target.usable_gib is None else f" of {target.usable_gib:.1f} GiB usable"
        print(f"  at its peak {peak.peak_bytes / 2**30:.2f} GiB{usable}")
