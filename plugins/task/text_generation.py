"""Complete a prompt, or converse.

Source: Optimizing LLMs for Speed and Memory, sections 1 (completion) and 3.2 (chats of many turns).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine import hookimpl
from engine.caching.continuing import common
from engine.caching.shared_prefix import SharedPrefix
from engine.contexts import CheckContext, Output, Receipt, TaskContext
from engine.conversation import Conversation
from engine.encoding import Encoded, encode
from engine.errors import Problem, RecipeError
from engine.generate import TextStream, answer_batch, begin, check_prompt, room_for
from engine.probe import probe_model
from engine.template import holds, render, try_out

if TYPE_CHECKING:
    from engine.session import Session

ENDINGS = ("a", " b", "\n1")
"""Prompts that begin differently: what their tokens have in common is the prefix's alone."""


@dataclass
class TextGeneration:
    """Complete text with a causal language model.

    `prefix` is put before each prompt: a long document, or with `chat_template` and in chats the
    system message. It goes through the model once; each prompt begins with a copy of its keys and
    values, wherever a text in two parts leaves the same as in one (Optimizing LLMs for Speed and
    Memory, section 3.2.1).
    """

    chat_template: bool = False
    """Put each prompt into the model's chat template, as one question of a user."""
    prefix: str | None = None
    """Text before each prompt."""

    @hookimpl
    def check(self, context: CheckContext) -> Iterator[Problem]:
        """Refuse a prefix that is none."""
        if self.prefix == "":
            yield Problem(
                slot="task",
                code="does-nothing",
                message="task.prefix is empty, and changes no prompt",
                hint="task.prefix=null",
            )

    @hookimpl
    def task(self, context: TaskContext) -> TextTask:
        """Supply completion, batches and chats."""
        return TextTask(context.session, chat_template=self.chat_template, prefix=self.prefix)

    @hookimpl
    def receipts(self, session: Session) -> Iterable[Receipt]:
        """Show that tokens went through the model, and how often those of the prefix did."""
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
        shared = session.built["task"].shared
        if shared is None:
            return
        held, arrives = shared.tokens_held, session.built["task"].prefix_arrives
        yield Receipt(
            slot="task",
            claim="the prefix was computed once, and is copied for each prompt"
            if not shared.refused
            else f"the prefix is computed for each prompt: {shared.refused}",
            evidence={
                "its text is in the prompt": arrives,
                "tokens of the prefix": len(shared),
                "tokens kept of it": held,
                "prompts that began with a copy": shared.uses,
                "tokens not forwarded again": shared.saved,
            },
            ok=arrives and held == (0 if shared.refused else len(shared)),
        )


class TextTask:
    """Completion, batches and chats on one session."""

    def __init__(self, session: Session, *, chat_template: bool, prefix: str | None) -> None:
        """Be ready.

        Raises:
            RecipeError: when a chat template is asked for and the model has none.
            CheckpointError: when the chat template fails.
            RuntimeFailure: when the prefix does not fit the model's context.
        """
        if chat_template and not session.tokenizer.chat_template:
            raise RecipeError(
                f"{session.recipe.model.path} has no chat template", hint="task.chat_template=false"
            )
        if chat_template:
            try_out(session.tokenizer, system=prefix)
        self._session = session
        self._chat_template = chat_template
        self._prefix = prefix
        self.shared = None if prefix is None else self._share()

    def probe(self) -> None:
        """Send eight tokens and one more through everything, and then the prefix."""
        self._session.probe = probe_model(self._session)
        if self.shared is not None:
            self.shared.compute()

    def stream(self, prompt: str) -> TextStream:
        """Answer piece by piece."""
        text = self._encoded(prompt)
        ids = text.ids
        check_prompt(self._session, ids)
        cache = self.shared.begin(ids) if self.shared is not None else None
        if cache is None:
            values, room = begin(self._session, ids)
            cache = values.cache
        else:
            room = room_for(self._session, cache, len(ids))
        return TextStream(self._session, ids, cache, room=room, notes=text.notes)

    def batch(self, prompts: Sequence[str]) -> list[Output]:
        """Answer all prompts together."""
        texts = [self._encoded(prompt) for prompt in prompts]
        for text in texts:
            check_prompt(self._session, text.ids)
        shared = self.shared if texts else None
        cache = None if shared is None else shared.begin_batch([text.ids for text in texts])
        return answer_batch(self._session, texts, cache)

    def chat(self, *, resume: Path | None = None) -> Conversation:
        """Start a conversation, or go on with one that was saved to a file."""
        if resume is not None:
            resumed = Conversation.resume(self._session, resume)
            self._refuse_other_beginning(resumed, resume)
            return resumed
        shared = self.shared
        if shared is None or not self._chat_template:  # then it is no system message
            return Conversation(self._session, system=self._prefix)
        return Conversation(self._session, system=self._prefix, share=shared.begin)

    def _refuse_other_beginning(self, resumed: Conversation, file: Path) -> None:
        """Refuse a prefix with which a saved conversation did not begin: it would be lost."""
        first = resumed.messages[:1]
        if self._prefix is None or first == [{"role": "system", "content": self._prefix}]:
            return
        began = first[0]["content"] if first and first[0]["role"] == "system" else None
        raise RecipeError(
            Problem(
                message=f"task.prefix={self._prefix!r}: the conversation in {file} began "
                + ("without one" if began is None else f"with {began!r}"),
                hint="task.prefix=null goes on as it began; another prefix needs a new chat",
                code="conversation-differs",
                slot="task",
            )
        )

    @property
    def prefix_arrives(self) -> bool:
        """Tell whether the tokens of a prompt hold the text of the prefix, as tokens tell it."""
        tokenizer = self._session.tokenizer
        said = encode(tokenizer, self._prefix or "", add_special_tokens=False).ids
        prompt = self._encoded(ENDINGS[0]).ids
        return holds(str(tokenizer.decode(prompt)), str(tokenizer.decode(said)))

    def _share(self) -> SharedPrefix:
        texts = [self._encoded(ending).ids for ending in ENDINGS]
        length = min(common(texts[0], other) for other in texts[1:])
        return SharedPrefix(self._session, texts[0][:length])

    def _encoded(self, prompt: str) -> Encoded:
        tokenizer, prefix = self._session.tokenizer, self._prefix
        if not self._chat_template:
            return encode(tokenizer, (prefix or "") + prompt)
        system = [] if prefix is None else [{"role": "system", "content": prefix}]
        text = render(tokenizer, [*system, {"role": "user", "content": prompt}])
        return encode(tokenizer, text, add_special_tokens=False)
