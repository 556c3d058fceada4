"""Render messages with the chat template that a checkpoint brings: its code, so it may fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str:
    """Return the text that `messages` become, up to where the model's answer begins.

    Raises:
        CheckpointError: when the chat template does not parse, or refuses the messages.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        )
    # The template is a program of the checkpoint's: it can raise whatever it likes.
    except Exception as error:
        line = getattr(error, "lineno", None)
        place = f" in line {line}" if line else ""
        cause = next(iter(str(error).splitlines()), "")
        raise CheckpointError(
            Problem(
                message=f"the chat template of the model fails{place}: "
                f"{type(error).__name__}: {cause}",
                hint="mend chat_template.jinja, or chat_template in tokenizer_config.json; "
                "engine run with task.chat_template=false completes text without it",
                code="chat-template",
                where=str(tokenizer.name_or_path),
            )
        ) from error


def try_out(tokenizer: PreTrainedTokenizerBase, *, system: bool = False) -> None:
    """Render the shortest conversation there is, so that a broken template is told at once.

    Raises:
        CheckpointError: as `render`.
    """
    first = [{"role": "system", "content": "Be brief."}] if system else []
    render(tokenizer, [*first, {"role": "user", "content": "Hello"}])
