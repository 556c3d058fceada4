"""Carry a conversation from turn to turn, and its keys and values with it.

The token ids that were really processed are remembered, because a cache does not store them.
Each turn compares them with what the chat template makes of all messages: what agrees is kept,
the rest is cut off the cache, and only what is new goes through the model. Leaving any of this to
chance gives wrong text without an error (`generate` trusts the length of what it is given).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.caching import cache_file, fingerprint
from engine.caching.carrying import ONE_BY_ONE
from engine.caching.continuing import common, cut, held_at_most, room_needed, tokens_held
from engine.contexts import KeyValues, Receipt
from engine.encoding import encode
from engine.errors import Problem, RecipeError
from engine.generate import TextStream, check_prompt, room_for
from engine.positions.rotary import frequency_set
from engine.session import check_text
from engine.template import render, try_out

if TYPE_CHECKING:
    from transformers import Cache

    from engine.session import Session

FIRST_CACHE_TOKENS = 4096
"""What a cache of fixed size starts with where the recipe does not say; it doubles when full."""


class Conversation:
    """Messages so far, the tokens they became, and the cache that holds them."""

    def __init__(
        self,
        session: Session,
        *,
        system: str | None = None,
        share: Callable[[list[int]], Cache | None] = lambda ids: None,
    ) -> None:
        """Start with no more than a system message.

        Args:
            share: gives a cache that holds the beginning of the first tokens already, if it can.

        Raises:
            RecipeError: when the model has no chat template.
            CheckpointError: when its chat template fails.
        """
        if not session.tokenizer.chat_template:
            raise RecipeError(
                f"{session.recipe.model.path} has no chat template: it completes text, and does "
                "not converse",
                hint="engine run instead, or put a chat_template.jinja beside its tokenizer",
            )
        try_out(session.tokenizer, system=system, turns=2)
        self._session = session
        self._share = share
        self._values: KeyValues | None = None
        self._room = 0
        self._ids: list[int] = []
        self._unread: TextStream | None = None
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.receipt: Receipt | None = None

    @classmethod
    def resume(cls, session: Session, path: Path) -> Conversation:
        """Go on with a conversation that `save` wrote, in another process perhaps.

        Raises:
            RecipeError: when its cache was made with a model or choices that differ.
            CheckpointError: when the file is damaged.
        """
        saved = cache_file.read(path)
        refuse_other(fingerprint.of_session(session), saved.about, path)
        _verify(saved, session.embedding_rows, path)
        made = cls(session)
        made.messages = [dict(each) for each in saved.about["messages"]]
        made._ids = list(saved.about["token ids"])
        if saved.cache is not None:
            made._values = made._allocate(int(saved.about["room"]))
            made._restore(saved, path)
        return made

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write messages, tokens and cache to a file; an answer that grows is broken off.

        Raises:
            RuntimeFailure: when no file can hold this cache, or the file cannot be written.
        """
        if self._unread is not None:
            self._unread.close()
        cache = self._values.cache if self._values is not None and self._ids else None
        about = {
            "recipe": self._session.recipe.name,
            "recipe digest": self._session.recipe.digest,
            "made with": fingerprint.of_session(self._session),
            "versions": {
                name: metadata.version(name) for name in ("recipe-engine", "transformers", "torch")
            },
            "messages": self.messages,
            "token ids": self._ids,
            "room": self._room,
        }
        room = self._room
        fresh = None if cache is None else self._allocate(room).cache
        cache_file.write(Path(path), about, cache, fresh)

    def _restore(self, saved: cache_file.Saved, path: Path) -> None:
        assert self._values is not None
        cache = self._values.cache
        try:
            if cache is None:
                raise ValueError("the recipe keeps no cache")
            cache_file.fill(cache, saved, self._session.device)
            if not 0 <= tokens_held(cache) <= len(self._ids):
                raise ValueError(f"it holds {tokens_held(cache)} tokens of {len(self._ids)}")
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise cache_file.damaged(path, f"does not fit this cache: {error}") from error

    def send(self, message: str) -> TextStream:
        """Answer `message`. An answer that was not read to its end is broken off by the next.

        A message counts as said when its answer begins to be read.

        Raises:
            RuntimeFailure: when `message` is no text, or the conversation no longer fits the
                model's context.
        """
        check_text(message)
        if self._unread is not None:
            self._unread.close()
        messages = [*self.messages, {"role": "user", "content": message}]
        ids, notes = self._tokens(messages)
        check_prompt(self._session, ids)
        cache, why_anew = self._cache_for(ids)
        kept = tokens_held(cache) if cache is not None else 0
        room = room_for(self._session, cache, len(ids))
        self.receipt = None

        def finished(new: list[int], text: str, sent: int) -> None:
            self._ids = ids + new
            self._unread = None
            self.messages = [*messages, {"role": "assistant", "content": text}]
            if cache is not None:
                self.receipt = self._prove(len(ids), kept, len(new), sent, why_anew)

        self._unread = TextStream(
            self._session, ids, cache, room=room, notes=notes, finished=finished
        )
        return self._unread

    def _prove(self, total: int, kept: int, new: int, sent: int, why_anew: str) -> Receipt:
        # Each new token but the last is sent through the model to get the next.
        return Receipt(
            slot="cache",
            plugin=self._session.recipe.choices.get("cache", ""),
            claim="this turn processed only what was new"
            if not why_anew
            else f"this turn processed everything: {why_anew}",
            evidence={
                "conversation_tokens": total,
                "from_cache": kept,
                "new_tokens": new,
                "forwarded": sent,
            },
            ok=sent <= total - kept + new,
        )

    def _tokens(self, messages: list[dict[str, str]]) -> tuple[list[int], list[str]]:
        """Return the tokens of all messages, and what the user should know of them."""
        tokenizer = self._session.tokenizer
        text = render(tokenizer, messages)
        encoded = encode(tokenizer, text, add_special_tokens=False)
        said = str(
            tokenizer.decode(
                self._ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
        if not self._ids or not tokenizer.is_fast or not text.startswith(said):
            return encoded.ids, encoded.notes
        # Tokenizing an answer again can split it otherwise than the model wrote it: what was said
        # keeps its tokens, what follows is as it is in its place.
        spans = encoded.spans
        tail = next((i for i, (start, _) in enumerate(spans) if start >= len(said)), len(spans))
        if 0 < tail < len(spans) and spans[tail - 1][1] <= len(said):
            return self._ids + encoded.ids[tail:], encoded.notes
        return encoded.ids, encoded.notes

    def _cache_for(self, ids: list[int]) -> tuple[Cache | None, str]:
        """Return a cache that holds a beginning of `ids`, never all, and why if it is a new one."""
        needed = room_needed(self._session, len(ids))
        if self._values is None:
            begun = self._share(ids)
            if begun is not None:
                self._values = KeyValues(cache=begun)
                self._room = held_at_most(self._session, self._values) or needed
                return begun, ""
            return self._anew(needed, "the conversation begins")
        cache = self._values.cache
        if cache is None:
            return None, ""
        if "decode.beam" in self._session.traits:
            return self._anew(needed, "beams leave a cache of their own")
        if not self._session.carrying.in_pieces:
            return self._anew(needed, ONE_BY_ONE)
        if self._frequencies_change(len(ids)):
            return self._anew(needed, "the frequencies of its positions change with its length")
        held = held_at_most(self._session, self._values)
        if held is not None and held < needed:
            grown = self._larger(needed, held, len(ids))
            if grown is not None:
                self._values = grown
                return grown.cache, "a larger cache was needed (cache.max_tokens sets its size)"
        # Not even a complete match may stay complete: the model must be given one token at least.
        same = min(tokens_held(cache), common(self._ids, ids), len(ids) - 1)
        if cut(self._session, cache, same):
            return cache, "" if tokens_held(cache) else "nothing of it was kept before"
        what = f"cache={self._session.recipe.choices.get('cache')}"
        if "model.uncroppable" in self._session.traits:
            what = "the state of the model's layers"
        return self._anew(needed, f"earlier text changed, and {what} cannot be cut back")

    def _anew(self, needed: int, why: str) -> tuple[Cache | None, str]:
        self._values = self._allocate(max(needed, FIRST_CACHE_TOKENS))
        return self._values.cache, why

    def _larger(self, needed: int, held: int, length: int) -> KeyValues | None:
        """Return a larger cache; None if no more is to be had: use what there is to its end."""
        room = self._room
        larger = self._allocate(max(needed, 2 * held))
        grown = held_at_most(self._session, larger)
        if grown is not None and grown <= held and held > length:
            self._room = room
            return None
        return larger

    def _frequencies_change(self, length: int) -> bool:
        session = self._session
        config = session.config
        return frequency_set(config, len(self._ids)) != frequency_set(config, length)

    def _allocate(self, tokens: int) -> KeyValues:
        limit = self._session.context_tokens
        self._room = tokens if limit is None else min(tokens, limit)
        return self._session.new_cache(1, self._room)


def _verify(saved: cache_file.Saved, rows: int, path: Path) -> None:
    """Refuse a file whose parts are not of the kinds that `save` writes.

    Raises:
        CheckpointError: with what is wrong.
    """
    messages, ids, room = (saved.about.get(key) for key in ("messages", "token ids", "room"))
    if not isinstance(messages, list) or not all(
        isinstance(one, dict)
        and one.keys() == {"role", "content"}
        and all(isinstance(value, str) for value in one.values())
        for one in messages
    ):
        raise cache_file.damaged(path, "has messages that are none")
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < rows for i in ids):
        raise cache_file.damaged(path, "has token ids that are none of the model's")
    if type(room) is not int or room < 0:
        raise cache_file.damaged(path, f"has room for {room} tokens")


def refuse_other(here: Mapping[str, Any], about: Mapping[str, Any], path: Path) -> None:
    """Refuse a conversation whose cache was made otherwise than this session would.

    Raises:
        RecipeError: with all that differs.
    """
    there = about.get("made with")
    there = there if isinstance(there, dict) else {}
    different = fingerprint.differences(here, there)
    if different or not there:
        raise RecipeError(
            Problem(
                message=f"{path} holds a conversation of another cache than this recipe makes: "
                f"{'; '.join(different) or 'it does not say which'}",
                hint=f"resume it with the recipe it was saved with ({about.get('recipe')}) and the "
                "model as it was then, or begin anew",
                code="conversation-differs",
                where=str(path),
            )
        )
