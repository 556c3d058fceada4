"""Rules that say what does not go together, each with who says so and when it was seen.

A plugin states them beside its traits:

    excludes = {
        "cache.static": Rule(
            code="assisted-static-cache",
            why="rejected drafts must be cut off again, and a static cache cannot be cut",
            hint="cache=dynamic",
            source="huggingface/transformers#32946",
            seen="transformers 5.23.0, 2026-11-22",
        )
    }

Libraries learn: the tests in `tests/rules` try each forbidden pair for real, and fail when it
works.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import Problem


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Refuse a combination, with a reason and its source."""

    code: str
    """Stable name, for machines and for the test that tries it."""
    why: str
    """The reason, as the second half of a sentence: '… does not work with …: <why>'."""
    hint: str
    """What to type instead."""
    source: str
    """Issue, paper, or file of a library that says so."""
    seen: str
    """Version and day on which it was seen to hold: 'transformers 5.23.0, 2026-11-22'."""

    def problem(self, slot: str, what: str) -> Problem:
        """Return the refusal of `what`, which is the first half of the sentence."""
        return Problem(
            message=f"{what}: {self.why}",
            hint=self.hint,
            code=self.code,
            slot=slot,
            source=f"{self.source} ({self.seen})",
        )
