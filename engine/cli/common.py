"""What the verbs share: arguments, progress, and how figures and receipts are printed."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.cli import streams
from engine.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from engine.builder import Progress
    from engine.contexts import Figures, Output, Receipt
    from engine.planning.scoring import Score
    from engine.recipe import Recipe
    from engine.session import Session

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [OVERRIDE]...",
        help="A recipe's name or file, then values to change: key=value.",
        show_default=False,
    ),
]
Recipes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE]... [OVERRIDE]...",
        help="Names or files of recipes, then values to change: key=value, or key=value,value.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]


def compose(arguments: Sequence[str] | None) -> Recipe:
    """Compose the recipe that the arguments name, or the default one."""
    from engine import recipe

    words = list(arguments or ())
    name = words.pop(0) if words and _is_name(words[0]) else recipe.DEFAULT
    return recipe.compose(name, words)


def compose_all(arguments: Sequence[str] | None) -> dict[str, Recipe]:
    """Compose every recipe that is named, with every combination of the overrides that vary.

    Returns:
        what tells each from the others → the recipe.
    """
    from engine import recipe
    from engine.composing.overrides import variants

    words = list(arguments or ())
    names = [word for word in words if _is_name(word)] or [recipe.DEFAULT]
    given = [word for word in words if not _is_name(word)]
    found: dict[str, Recipe] = {}
    for name in names:
        for overrides in variants(given):
            varied = [word for word in overrides if word not in given]
            label = " ".join([*([name] if len(names) > 1 or not varied else []), *varied])
            found[label] = recipe.compose(name, overrides)
    return found


def _is_name(word: str) -> bool:
    return "=" not in word and not word.startswith(("~", "+"))


def read_prompt(text: str | None) -> str:
    """Return the prompt that `-p` means: text, @FILE, or '-' for standard input.

    The same text is the same prompt by each of them: line breaks are those of Unix, and neither the
    mark at the beginning of a file nor the line break at its end is part of it.
    """
    if text is None:
        return "" if sys.stdin.isatty() else _stdin()
    if text == "-":
        return _stdin()
    if not text.startswith("@"):
        return _text(os.fsencode(text), "-p TEXT")
    file = Path(text[1:]).expanduser()
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"-p {text}: cannot read {file}: {error.strerror}",
            hint="-p @FILE reads a UTF-8 file; to start a prompt with @, pipe it in: -p -",
        ) from error
    return _text(content, str(file))


def _stdin() -> str:
    return _text(streams.require_stdin().buffer.read(), "standard input")


def _text(content: bytes, whose: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(whose, error) from error
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def not_utf8(whose: str, error: UnicodeDecodeError) -> RecipeError:
    """Return the refusal of text in another encoding."""
    utf_16 = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
    source = " -f utf-16" if utf_16 else ""
    return RecipeError(
        f"{whose} is not UTF-8 text{' but UTF-16' if utf_16 else ''}: {error.reason} at byte "
        f"{error.start}",
        hint=f"convert it: iconv{source} -t utf-8 < FILE | engine run -p -",
    )


def build(recipe: Recipe) -> Session:
    """Build a recipe, saying on a terminal what is being done."""
    from engine.builder import build as build_session

    with progress() as tell:
        session = build_session(recipe, progress=tell)
    print_notes(session.notes)
    return session


def print_notes(notes: Sequence[str]) -> None:
    """Print on stderr what the user should know although nothing is wrong."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


@contextmanager
def progress() -> Iterator[Progress]:
    """Show steps as they are told, on a terminal; elsewhere stay quiet."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    with stderr().status("starting") as status:
        yield lambda step: status.update(f"{step} …")


def stderr() -> Console:
    """Return a console for what is not the answer itself."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Print one object on one line, in letters that standard output can take."""
    text = json.dumps(value, ensure_ascii=False, default=_plain)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, default=_plain)
    print(text)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def as_json(output: Output, receipts: Sequence[Receipt], **more: Any) -> dict[str, Any]:
    """Return the object that `--json` prints for an answer."""
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "figures": output.figures,
        "receipts": [receipt.as_dict() for receipt in receipts],
        "notes": list(output.notes),
        **more,
    }


def figures_line(figures: Figures, reason: str, device: str) -> str:
    """Phrase what a run measured."""
    parts = [
        f"{figures.prompt_tokens} prompt + {figures.new_tokens} new tokens",
        f"{figures.forwarded_tokens} forwarded",
        f"first token {figures.time_to_first_token * 1000:.0f} ms",
    ]
    if figures.drafted_tokens is not None:
        parts.append(f"{figures.accepted_tokens} of {figures.drafted_tokens} drafts accepted")
    if figures.tokens_per_second is not None:
        parts.append(f"{figures.tokens_per_second:.1f} tokens/s")
    whose = "of the process" if device == "cpu" else f"on {device}"
    parts += [f"peak {figures.peak_memory_bytes / 2**20:,.0f} MiB {whose}", f"ended by {reason}"]
    return " · ".join(parts)


def score(session: Session, figures: Figures) -> Score:
    """Hold the plan against what a run measured, and keep the score."""
    from engine.planning import scoring

    found = scoring.score(session, figures)
    why_not = scoring.keep(session, found, figures)
    if why_not:
        print(f"note: {why_not}", file=sys.stderr)
    return found


def planned(found: Score) -> str:
    """Phrase what was planned, and how far that was off."""
    from engine.planning import scoring

    return scoring.phrase(found)


def print_receipts(receipts: Sequence[Receipt]) -> None:
    """Print the proofs on stderr, each with its evidence below."""
    for one in receipts:
        verdict = "ok" if one.ok else "NO"
        print(f"{verdict}  {one.slot}={one.plugin}: {one.claim}", file=sys.stderr)
        evidence = ", ".join(f"{key} {_short(value)}" for key, value in one.evidence.items())
        print(f"      {evidence}", file=sys.stderr)


def _short(value: str | int | float | bool) -> str:
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
