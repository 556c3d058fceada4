"""Build a recipe: hooks in the order of a run, then a probe, then receipts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from engine.attending.masks import never_skipped, with_bias
from engine.contexts import (
    Attention,
    AttentionContext,
    DecodeContext,
    HeadsContext,
    LoadContext,
    PositionContext,
    PrepareContext,
    QuantizeContext,
    TaskContext,
)
from engine.decoding.stop_strings import never_produced
from engine.errors import CheckpointError, EngineError, Problem, RecipeError
from engine.loading import checkpoint
from engine.loading.common import give_back, made_config, quiet
from engine.probe import failing_together
from engine.recipe import Recipe
from engine.session import Session
from engine.target import Target
from engine.verdict import check

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PretrainedConfig

    from engine.contexts import Bias
    from engine.shape import ModelShape

_numbers = itertools.count()

Progress = Callable[[str], None]


def build(recipe: Recipe, *, progress: Progress = lambda step: None) -> Session:
    """Build a recipe into a session whose every choice has proven that it took effect.

    Args:
        progress: is told each step before it starts, in a few words.

    Raises:
        RecipeError, DoesNotFit: when `check` refuses.
        CheckpointError: when the model's files are not what they should be.
        PluginError: when a hook fails, or a choice did not take effect.
    """
    progress("checking")
    verdict = check(recipe)
    verdict.raise_for_problems()
    progress("finding the model")
    here = checkpoint.locate(recipe.model.path, recipe.model.revision, download=False) is not None
    folder = checkpoint.locate(recipe.model.path, recipe.model.revision, download=True)
    if folder is not None and not here:  # its config.json has come just now
        verdict = check(recipe)
        verdict.raise_for_problems()
    if folder is None:
        raise CheckpointError(
            f"{recipe.model.path} is neither a folder nor at the hub",
            hint="model.path=FOLDER_OR_HUB_ID",
        )
    progress("importing torch and transformers")
    with quiet():
        # It imports the quantizers that are installed, and these complain of kernels.
        import transformers.modeling_utils  # noqa: F401

        source = _read_config(recipe, folder, verdict.shape)
    device = _device()
    if verdict.target.kind != device.type:  # what the target can, this machine may not
        check(recipe, target=Target(name="this machine")).raise_for_problems()
    session = Session(
        recipe=recipe,
        hooks=verdict.hooks,
        source_config=source,
        config=source,
        device=device,
        shape=cast("ModelShape", verdict.shape),
    )
    session.notes += verdict.notes
    note = _other_machine(verdict.target.kind, device)
    if note:
        session.notes.append(note)
    try:
        _build(session, folder, progress)
    except BaseException:
        with suppress(EngineError):  # what went wrong first is what is told
            session.close()
        raise
    return session


def _build(session: Session, folder: Path, progress: Progress) -> None:
    recipe, hooks, built = session.recipe, session.hooks, session.built
    dtype = _dtype(recipe, session.source_config, session.device)
    positions = hooks.position_encoding(PositionContext(config=session.source_config))
    heads = hooks.heads(HeadsContext(config=positions.config))
    session.config = heads.config
    quantization = hooks.quantize(
        QuantizeContext(config=session.config, dtype=dtype, device=session.device)
    )
    attention = hooks.attention(
        AttentionContext(config=session.config, bias=positions.bias, scores=positions.scores)
    )
    if positions.bias is not None and attention.forward is None:
        attention = _implementation(session, attention.implementation)
    built.update(
        position_encoding=positions, heads=heads, quantize=quantization, attention=attention
    )
    progress(f"loading {recipe.model.path}")
    built["load"] = hooks.load(
        LoadContext(
            recipe=recipe,
            folder=folder,
            config=session.config,
            dtype=dtype,
            device=session.device,
            position_encoding=positions,
            heads=heads,
            quantization=quantization,
            attention_implementation=_register(session, attention, positions.bias),
        )
    )
    give_back()
    session.config = session.model.config
    session.device = built["load"].device or session.device
    session.model.register_forward_pre_hook(_counter(session), with_kwargs=True)
    hooks.prepare(PrepareContext(recipe=recipe, model=session.model))
    built["decode"] = hooks.decode(
        DecodeContext(
            model=session.model,
            tokenizer=session.tokenizer,
            seed=recipe.seed,
            end_ids=session.end_ids,
        )
    )
    stops = getattr(recipe.decode, "stop", ())
    session.notes += [
        f"decode.stop: {stop!r} never comes, for no tokens of this model make it"
        for stop in never_produced(session.tokenizer, stops)
    ]
    built["task"] = hooks.task(TaskContext(session=session))
    progress("proving each choice")
    with failing_together(session), hooks.blaming(hooks.slot("task"), "task"):
        session.task.probe()
    session.collect_receipts()
    session.observe("built", recipe=recipe.name, digest=recipe.digest)


def _read_config(recipe: Recipe, folder: Path, shape: ModelShape | None) -> PretrainedConfig:
    try:
        config = made_config(
            folder,
            () if shape is None else shape.ignored,
            trust_remote_code=recipe.model.trust_remote_code,
        )
    except EngineError:
        raise
    except Exception as error:
        what = "transformers cannot use the config"
        raise checkpoint.unusable(folder, error, what) from error
    for part in (config, config.get_text_config()):
        part.return_dict = True  # how to answer is for the caller to say, who is the engine
    # The attention implementation comes from the recipe, never from the checkpoint.
    config._attn_implementation_internal = None
    return config


def _device() -> torch.device:
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def _other_machine(kind: str, device: torch.device) -> str:
    if kind == device.type:
        return ""
    return (
        f"the target is a {kind} device; this run is on {device.type}: its speed says nothing "
        "about the target"
    )


def _dtype(recipe: Recipe, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    import torch

    if recipe.model.dtype.value != "auto":
        return getattr(torch, recipe.model.dtype.value)  # type: ignore[no-any-return]
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    return stored or (torch.float32 if device.type == "cpu" else torch.bfloat16)


def _register(session: Session, attention: Attention, bias: Bias | None) -> str | None:
    """Register forward and mask under a name of the session's own; with the bias, if there is one.

    An implementation of transformers goes by its own name.
    """
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    one = session.hooks.slot("attention")
    forward, mask = attention.forward, attention.mask
    if forward is None or mask is None:
        return attention.implementation
    if "model.attention_interface" not in session.shape.traits:
        raise RecipeError(
            Problem(
                message=f"{one.label} brings attention of its own, and the code of "
                f"{session.shape.model_type} takes none from outside",
                hint="attention=native",
                code="attention-interface",
                slot="attention",
            )
        )
    # Without 'sdpa', 'flash', 'flex' or '/': transformers gives names with these a meaning.
    name = f"engine:{next(_numbers)}"

    def counted(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # code would be compiled again for each number
            session.attention_calls += 1
        with session.hooks.blaming(one, "attention"):
            return forward(*args, **kwargs)

    AttentionInterface.register(name, counted)
    AttentionMaskInterface.register(
        name, never_skipped(mask if bias is None else with_bias(mask, bias))
    )

    def forget() -> None:
        for interface in (AttentionInterface, AttentionMaskInterface):
            with suppress(KeyError):
                del interface._global_mapping[name]

    session.on_close.append(forget)
    return name


def _implementation(session: Session, name: str | None) -> Attention:
    """Return an implementation of transformers as forward and mask, which takes a bias."""
    from transformers import AttentionInterface, AttentionMaskInterface

    forwards: Any = cast(Any, AttentionInterface)()
    masks: Any = cast(Any, AttentionMaskInterface)()
    if name not in forwards or name not in masks:
        one = session.hooks.slot("attention")
        raise RecipeError(
            Problem(
                message=f"{one.label} adds no bias to the scores, and position_encoding="
                f"{session.recipe.choices.get('position_encoding')} needs that",
                hint="attention=sdpa",
                code="attention-bias",
                slot="attention",
            )
        )
    return Attention(forward=forwards[name], mask=masks[name])


def _counter(session: Session) -> Callable[[Any, Any, dict[str, Any]], None]:
    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            ids = kwargs["inputs_embeds"][..., 0]
        session.forwarded_tokens += ids.numel()

    return count
