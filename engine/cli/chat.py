"""`engine chat`: a conversation; the cache carries over from turn to turn."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli import common, streams
from engine.errors import EngineError, PluginError, RecipeError, RuntimeFailure

if TYPE_CHECKING:
    from engine.contexts import Chat, Output
    from engine.recipe import Recipe
    from engine.session import Session

COMMANDS = "/reset starts anew, /exit (or Ctrl-D) ends, Ctrl-C breaks off an answer"


def chat(
    arguments: common.Arguments = None,
    json: common.Json = False,
    save: Annotated[
        Path | None,
        typer.Option(
            help="Write the conversation, cache and all, to FILE at the end, however it ends.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with the conversation in FILE.", metavar="FILE", show_default=False
        ),
    ] = None,
) -> None:
    """Converse: one message per line, from the terminal or piped in.

    engine chat

    printf 'first question\\nsecond question\\n' | engine chat tiny --json

    engine chat --save talk.safetensors

    engine chat --resume talk.safetensors --save talk.safetensors

    With --json each turn prints one object on a line: text, token_ids, figures, receipts.
    """
    recipe = common.compose(arguments)
    streams.require_stdin()
    _look_ahead(recipe, save, resume)
    with common.build(recipe) as session:
        conversation = session.chat(resume=resume)
        if sys.stdin.isatty():
            print(f"{recipe.model.path}: {COMMANDS}", file=sys.stderr)
        said = False
        try:
            for message in _messages():
                said = True
                if message == "/exit":
                    break
                if message == "/reset":
                    conversation = session.chat()
                    print("a new conversation", file=sys.stderr)
                elif message.startswith("/") and sys.stdin.isatty():
                    print(COMMANDS, file=sys.stderr)
                else:
                    _turn(session, conversation, message, json=json)
        except (EngineError, KeyboardInterrupt):
            with suppress(EngineError):  # what went wrong first is what is told
                _save(conversation, save if said else None)
            raise
        _save(conversation, save if said else None)
        if not said:
            print("nothing was said: one message per line, typed or piped in", file=sys.stderr)


def _save(conversation: Chat, file: Path | None) -> None:
    if file is not None:
        conversation.save(file)
        print(f"saved to {file} ({file.stat().st_size:,} bytes)", file=sys.stderr)


def _look_ahead(recipe: Recipe, save: Path | None, resume: Path | None) -> None:
    """Refuse files that cannot be written or resumed, before the model loads."""
    from engine.caching import cache_file

    if save is not None and (why := cache_file.unwritable(save)):
        raise RecipeError(
            f"--save {save}: {why}", hint="name a file in a folder that can be written"
        )
    if resume is not None:
        from engine import conversation
        from engine.caching import fingerprint

        about = cache_file.read_about(resume)
        conversation.refuse_other(fingerprint.of_recipe(recipe), about, resume)


def _turn(session: Session, conversation: Chat, message: str, *, json: bool) -> None:
    try:
        stream = conversation.send(message)
    except RuntimeFailure as error:
        if not sys.stdin.isatty():
            raise
        print(f"error: {error}\n  /reset starts anew", file=sys.stderr)
        return
    try:
        with closing(stream):
            for piece in stream:
                if not json:
                    print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print("\n(broken off)", file=sys.stderr)
        return
    _report(session, conversation, stream.output, json=json)


def _report(session: Session, conversation: Chat, output: Output, *, json: bool) -> None:
    receipt = conversation.receipt
    if receipt is not None and not receipt.ok:
        evidence = ", ".join(f"{key} {value}" for key, value in receipt.evidence.items())
        raise PluginError(
            f"cache={receipt.plugin} did not take effect: {receipt.claim}; evidence: {evidence}",
            hint="cache=dynamic, or report it to the plugin's author",
        )
    found = common.score(session, output.figures)
    if json:
        receipts = [one for one in [*session.receipts, receipt] if one]
        common.print_json(common.as_json(output, receipts, plan=found.as_dict()))
        return
    print()
    common.print_notes(output.notes)
    line = common.figures_line(output.figures, output.finish_reason, session.device.type)
    kept = f" · {receipt.evidence['from_cache']} tokens from the cache" if receipt else ""
    print(f"\n{line}{kept}\n{common.planned(found)}\n", file=sys.stderr)


def _messages() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print(file=sys.stderr)
            continue
        except UnicodeDecodeError as error:
            raise common.not_utf8("standard input", error) from error
        if line.strip():
            yield line.strip()
