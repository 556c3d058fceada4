"""Complete a prompt, or converse.

Source: Optimizing LLMs for Speed and Memory, sections 1 (completion) and 3.2 (chats of many turns).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine import hookimpl
from engine.contexts import Output, Receipt, TaskContext
from engine.conversation import Conversation
from engine.errors import RecipeError
from engine.generate import TextStream, answer_batch, begin
from engine.probe import probe_model
from engine.template import render

if TYPE_CHECKING:
    from engine.session import Session


@dataclass
class TextGeneration:
    """Complete text with a causal language model."""

    chat_template: bool = False
    """Put each prompt into the model's chat template, as one question of a user."""

    @hookimpl
    def task(self, context: TaskContext) -> TextTask:
        """Supply completion, batches and chats."""
        return TextTask(context.session, chat_template=self.chat_template)

    @hookimpl
    def receipts(self, session: Session) -> Iterable[Receipt]:
        """Show that tokens went through the model."""
        tokens = sum(session.probe.tokens)
        yield Receipt(
            slot="task",
            claim="text goes through the model and comes back",
            evidence={
                "probe_tokens": tokens,
                "vocabulary": len(session.tokenizer),
                "chat_template": self.chat_template,
            },
            ok=tokens > 0,
        )


class TextTask:
    """Completion, batches and chats on one session."""

    def __init__(self, session: Session, *, chat_template: bool) -> None:
        """Be ready.

        Raises:
            RecipeError: when a chat template is asked for and the model has none.
        """
        if chat_template and not session.tokenizer.chat_template:
            raise RecipeError(
                f"{session.recipe.model.path} has no chat template", hint="task.chat_template=false"
            )
        self._session = session
        self._chat_template = chat_template

    def probe(self) -> None:
        """Send eight tokens and one more through everything."""
        self._session.probe = probe_model(self._session)

    def stream(self, prompt: str) -> TextStream:
        """Answer piece by piece."""
        ids = self._tokens(prompt)
        values, room = begin(self._session, ids)
        return TextStream(self._session, ids, values.cache, room=room)

    def batch(self, prompts: Sequence[str]) -> list[Output]:
        """Answer all prompts together."""
        return answer_batch(self._session, [self._tokens(prompt) for prompt in prompts])

    def chat(self) -> Conversation:
        """Start a conversation."""
        return Conversation(self._session)

    def _tokens(self, prompt: str) -> list[int]:
        tokenizer = self._session.tokenizer
        if not self._chat_template:
            # Not verbose: what is too long is refused with numbers, by `begin`.
            return list(tokenizer(prompt, verbose=False)["input_ids"])
        text = render(tokenizer, [{"role": "user", "content": prompt}])
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
