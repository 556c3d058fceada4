"""Hold plans against what runs measured, and keep the score: a line of JSON for each run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.planning.calibration import known
from engine.planning.passes import Pass, Pricer
from engine.target import detect

if TYPE_CHECKING:
    from engine.contexts import Figures
    from engine.recipe import Recipe
    from engine.session import Session

LATEST = 500
"""Runs that the summary looks back on."""

FEWEST = 4
"""New tokens below which a speed means nothing."""

MEASURES = ("tokens_per_second", "time_to_first_token", "peak_memory_bytes")


@dataclass(frozen=True)
class Score:
    """What was planned for a run, and what it measured."""

    planned: Mapping[str, float]
    measured: Mapping[str, float]

    @property
    def errors(self) -> Mapping[str, float]:
        """Return how far the plan was from what was measured, as a share of that."""
        return {
            name: value / self.measured[name] - 1
            for name, value in self.planned.items()
            if self.measured.get(name)
        }

    def as_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {"planned": dict(self.planned), "measured": dict(self.measured)} | {
            "errors": dict(self.errors)
        }


def score(session: Session, figures: Figures, *, batch: int = 1) -> Score:
    """Plan the run that was, on the machine where it was, and hold the plan against it."""
    target = detect()
    pricer = known(Pricer(session.recipe, session.hooks, session.shape, target, None))
    first, middle = _passes(pricer, figures, batch)
    on_device = session.device.type != "cpu"
    peak = max(each.tensor_bytes if on_device else each.peak_bytes for each in (first, middle))
    planned: dict[str, float] = {"peak_memory_bytes": peak}
    if first.cost is not None and middle.cost is not None:
        right = figures.accepted_tokens or 0
        per_pass = figures.new_tokens / max(figures.new_tokens - right, 1)
        planned["time_to_first_token"] = first.cost.seconds
        if figures.new_tokens >= FEWEST:
            planned["tokens_per_second"] = per_pass / middle.cost.seconds
    measured = {name: float(getattr(figures, name) or 0.0) for name in MEASURES}
    return Score(planned, measured)


def _passes(pricer: Pricer, figures: Figures, batch: int) -> tuple[Pass, Pass]:
    """Return the pass of what was new in the prompt, and that of a token in the middle."""
    prompt, new = figures.prompt_tokens, figures.new_tokens
    decode: Any = pricer.recipe.decode
    longest = prompt + int(decode.max_new_tokens)
    if pricer.shape.max_positions is not None:
        longest = min(longest, pricer.shape.max_positions)
    kept = "cache.none" not in pricer.traits and batch == 1 and not pricer.drafts
    sent = figures.forwarded_tokens - (new - 1) if kept else prompt
    sent = sent if 1 <= sent <= prompt else prompt
    # A pass of a single token is not one of a draft here, hence two at least.
    first = pricer.price(batch=batch, new=max(sent, 2), tokens=prompt, max_tokens=longest)
    middle = pricer.price(batch=batch, new=1, tokens=prompt + new // 2, max_tokens=longest)
    return first, middle


def file() -> Path:
    """Return where the score is kept."""
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(home) / "engine" / "scores.jsonl"


def keep(session: Session, found: Score, figures: Figures) -> str:
    """Add a run to the score; return why that was not possible, or ''."""
    entry = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": detect().name,
        "recipe": session.recipe.name,
        "digest": session.recipe.digest,
        "model": session.recipe.model.path,
        "choices": session.recipe.choices,
        "figures": dataclasses.asdict(figures),
        **found.as_dict(),
    }
    place = file()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(entry) + "\n")
    except OSError as error:
        return f"the score was not kept: {place}: {error.strerror}"
    return ""


def phrase(found: Score) -> str:
    """Say what was planned, and how far that was off."""
    errors = found.errors
    words = {
        "time_to_first_token": ("first token {:,.0f} ms", 1e3),
        "tokens_per_second": ("{:,.1f} tokens/s", 1),
        "peak_memory_bytes": ("peak {:,.0f} MiB", 1 / 2**20),
    }
    parts = [
        f"{said.format(found.planned[name] * unit)} ({errors[name]:+.0%})"
        for name, (said, unit) in words.items()
        if name in errors
    ]
    unknown = "" if "time_to_first_token" in found.planned else "; for speed: engine calibrate"
    return f"planned: {' · '.join(parts)}{unknown}" if parts else ""


def summary(recipe: Recipe) -> dict[str, Any]:
    """Return how far plans of this machine were off, by the median of its latest runs.

    Of the same model and choices, where there are such runs.
    """
    here, same = detect().name, (recipe.model.path, recipe.choices)
    entries = [entry for entry in _entries() if entry.get("device") == here]
    own = [entry for entry in entries if (entry.get("model"), entry.get("choices")) == same]
    entries = (own or entries)[-LATEST:]
    found: dict[str, Any] = {"runs": len(entries), "same": bool(own)}
    for name in MEASURES:
        stated = [entry["errors"].get(name) for entry in entries]
        errors = [
            abs(error) for error in stated if isinstance(error, float) and math.isfinite(error)
        ]
        if errors:
            found[name] = statistics.median(errors)
    return found


def _entries() -> Iterator[dict[str, Any]]:
    try:
        lines = file().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the last line of a run that was killed
        if isinstance(entry, dict) and isinstance(entry.get("errors"), dict):
            yield entry
