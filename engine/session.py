"""A built recipe: model, tokenizer, plugins, ready to run."""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from engine.contexts import CacheContext, Chat, Event, KeyValues, Output, Receipt, Stream, Task
from engine.errors import RuntimeFailure
from engine.probe import Probe

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from engine.caching.carrying import Carrying
    from engine.hooks import Hooks
    from engine.recipe import Recipe
    from engine.shape import ModelShape


@dataclass(eq=False, kw_only=True)
class Session:
    """Run prompts through a built recipe.

    One at a time: a session holds one model and one decoder. Make it with `engine.build`, and
    close it (or use `with`) to give the model back.
    """

    recipe: Recipe
    hooks: Hooks
    source_config: PretrainedConfig
    """As the checkpoint has it."""
    config: PretrainedConfig
    """As the hooks left it."""
    device: torch.device
    shape: ModelShape
    """As the hook `reshape` left it."""
    built: dict[str, Any] = field(default_factory=lambda: {"observe": {}})
    """Hook → what it returned; for `observe`, what it keeps in `event.kept`."""
    probe: Probe = field(default_factory=Probe)
    """What a minimal run showed, before the first real one."""
    receipts: list[Receipt] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the user should know although nothing is wrong."""
    forwarded_tokens: int = 0
    """Tokens that went through the model so far, padding included."""
    attention_calls: int = 0
    """How often a custom attention forward ran in the probe."""
    on_close: list[Any] = field(default_factory=list)
    closed: bool = False

    @property
    def model(self) -> PreTrainedModel:
        """Return the loaded model."""
        return self._open_part("load").model  # type: ignore[no-any-return]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the model's tokenizer.

        Raises:
            RuntimeFailure: when the model came without one.
        """
        tokenizer = self._open_part("load").tokenizer
        if tokenizer is None:
            raise RuntimeFailure(
                f"{self.recipe.model.path} has no tokenizer, and text needs one",
                hint="put tokenizer.json and tokenizer_config.json beside config.json",
            )
        return tokenizer  # type: ignore[no-any-return]

    @property
    def task(self) -> Task:
        """Return what the recipe is for."""
        return self._open_part("task")  # type: ignore[no-any-return]

    def _open_part(self, hook: str) -> Any:
        self._require_open()
        return self.built[hook]

    def _require_open(self) -> None:
        if self.closed:
            raise RuntimeFailure(
                "the session is closed, and its model given back",
                hint="build it again: engine.build(session.recipe)",
            )

    @property
    def traits(self) -> frozenset[str]:
        """Return what the model and the chosen plugins provide."""
        provided = (getattr(one.plugin, "provides", ()) for one in self.hooks.chosen)
        return self.shape.traits.union(*provided)

    @property
    def context_tokens(self) -> int | None:
        """Return how many tokens the model has positions for, or None if it has no limit."""
        return self.shape.max_positions

    @cached_property
    def embedding_rows(self) -> int:
        """Return how many token ids the model has embeddings for."""
        return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[index]

    @cached_property
    def carrying(self) -> Carrying:
        """Return what the model's code makes of a past that a cache gives back, once measured."""
        from engine.caching.carrying import Carrying

        return Carrying(self)

    @cached_property
    def weights_digest(self) -> str:
        """Return a digest of every byte of the weights, read once."""
        from engine.caching.fingerprint import weights

        return weights(self.model)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Return what ends an answer: the model's tokens, or the tokenizer's if it names none."""
        given = getattr(self.model.generation_config, "eos_token_id", None)
        given = self.tokenizer.eos_token_id if given is None else given
        return frozenset(given if isinstance(given, list) else [given]) - {None}

    def stream(self, prompt: str) -> Stream:
        """Answer piece by piece; after the last piece `.output` holds text, tokens and figures.

        Raises:
            RuntimeFailure: when the session is closed, or `prompt` is no text.
        """
        self._require_open()
        check_text(prompt)
        with self.hooks.blaming(self.hooks.slot("task"), "task"):
            return self.task.stream(prompt)

    @overload
    def generate(self, prompts: str) -> Output: ...
    @overload
    def generate(self, prompts: list[str] | tuple[str, ...]) -> list[Output]: ...
    def generate(self, prompts: str | list[str] | tuple[str, ...]) -> Output | list[Output]:
        """Answer one prompt, or several together as one batch.

        Raises:
            RuntimeFailure: when the session is closed, or a prompt is no text.
        """
        if isinstance(prompts, list | tuple):
            self._require_open()
            for prompt in prompts:
                check_text(prompt)
            with self.hooks.blaming(self.hooks.slot("task"), "task"):
                return self.task.batch(list(prompts))
        stream = self.stream(prompts)
        for _ in stream:
            pass
        return stream.output

    def chat(self, resume: str | os.PathLike[str] | None = None) -> Chat:
        """Start a conversation; its cache carries over from turn to turn.

        Args:
            resume: a file that `Chat.save` wrote: go on with its conversation, cache and all.

        Raises:
            RecipeError: when that file was written with a model or choices that differ.
            CheckpointError: when it is damaged.
        """
        self._require_open()
        with self.hooks.blaming(self.hooks.slot("task"), "task"):
            return self.task.chat() if resume is None else self.task.chat(resume=Path(resume))

    def new_cache(self, batch: int, max_tokens: int) -> KeyValues:
        """Make room for the keys and values of `max_tokens` tokens in each of `batch` sequences."""
        context = CacheContext(config=self.config, batch=batch, max_tokens=max_tokens)
        return self.hooks.cache(context)

    def collect_receipts(self) -> list[Receipt]:
        """Ask every plugin for its proofs, now."""
        from engine.receipts import collect

        self._require_open()
        self.receipts = collect(self)
        return self.receipts

    def observe(self, kind: str, **data: Any) -> None:
        """Tell the observers that something happened."""
        kept = self.built.setdefault("observe", {})
        self.hooks.observe(Event(kind=kind, data=data, kept=kept))

    def close(self) -> None:
        """Let go of the model, and of what was registered for it; again does nothing."""
        self.closed = True
        try:
            self._close_decoder()
        finally:
            while self.on_close:
                self.on_close.pop()()
            self.built.clear()
            if "weights.packed" in self.traits:
                # Layers of bitsandbytes and torchao refer to themselves: only this frees them.
                gc.collect()
        with suppress(ImportError):
            import torch

            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _close_decoder(self) -> None:
        close = getattr(self.built.get("decode"), "close", None)
        if close is not None:
            with self.hooks.blaming(self.hooks.slot("decode"), "decode"):
                close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def check_text(prompt: object) -> None:
    """Refuse what no tokenizer takes, before a plugin is blamed for it."""
    if not isinstance(prompt, str):
        raise RuntimeFailure(
            f"a prompt is text, and this is {type(prompt).__name__}: {prompt!r:.60}",
            hint="pass a str, or to generate a list of str",
        )
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RuntimeFailure(
            f"a prompt is text, and this has half a character at position {error.start}: "
            f"{prompt[error.start]!r}",
            hint="decode the bytes it came from as UTF-8, without surrogates",
        ) from error
