"""Build a recipe: hooks in the order of a run, then a probe, then receipts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from engine.attending.registering import register
from engine.caching.counting import count_tokens
from engine.contexts import (
    AttentionContext,
    ConfigureContext,
    DecodeContext,
    HeadsContext,
    LoadContext,
    PositionContext,
    PrepareContext,
    QuantizeContext,
    TaskContext,
)
from engine.decoding.stop_strings import never_produced
from engine.errors import CheckpointError, EngineError
from engine.loading import checkpoint, model_folder
from engine.loading.common import give_back, made_config, quiet
from engine.probe import failing_together, verify_carrying
from engine.recipe import Recipe
from engine.session import Session
from engine.target import HERE, Target
from engine.verdict import check

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PretrainedConfig

    from engine.contexts import ModelConfig
    from engine.shape import ModelShape

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
    if folder is None:
        raise CheckpointError(
            f"{recipe.model.path} is neither a folder nor at the hub",
            hint="model.path=FOLDER_OR_HUB_ID",
        )
    told = verdict.hooks.configure(ConfigureContext(recipe=recipe, folder=folder, download=True))
    if not here or verdict.shape is None:  # its config has come just now
        verdict = check(recipe)
        verdict.raise_for_problems()
    progress("importing torch and transformers")
    with quiet():
        # It imports the quantizers that are installed, and these complain of kernels.
        import transformers.modeling_utils  # noqa: F401

        source = _read_config(recipe, folder, told, verdict.shape)
    device = _device()
    if verdict.target.kind != device.type:  # what the target can, this machine may not
        check(recipe, target=Target(name=HERE)).raise_for_problems()
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
    positions = hooks.position_encoding(
        PositionContext(config=session.source_config, traits=session.traits)
    )
    heads = hooks.heads(HeadsContext(config=positions.config))
    session.config = heads.config
    quantization = hooks.quantize(
        QuantizeContext(config=session.config, dtype=dtype, device=session.device)
    )
    attention = hooks.attention(
        AttentionContext(config=session.config, bias=positions.bias, scores=positions.scores)
    )
    attention, name = register(session, attention, positions)
    built.update(
        position_encoding=positions, heads=heads, quantize=quantization, attention=attention
    )
    progress(f"loading {recipe.model.path}")
    built["load"] = hooks.load(
        LoadContext(
            recipe=recipe,
            folder=folder,
            source_config=session.source_config,
            config=session.config,
            dtype=dtype,
            device=session.device,
            position_encoding=positions,
            heads=heads,
            quantization=quantization,
            attention_implementation=name,
        )
    )
    give_back()
    session.config = session.model.config
    session.device = built["load"].device or session.device
    session.model.register_forward_pre_hook(_counter(session), with_kwargs=True)
    count_tokens(session.model)
    hooks.prepare(PrepareContext(recipe=recipe, model=session.model, notes=session.notes))
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
        verify_carrying(session)
    session.collect_receipts()
    session.observe("built", recipe=recipe.name, digest=recipe.digest)


def _read_config(
    recipe: Recipe, folder: Path, told: ModelConfig | None, shape: ModelShape | None
) -> PretrainedConfig:
    try:
        if told is None:
            model_folder.refuse_listed(recipe.model.path, recipe.model.revision, folder)
        config = made_config(
            folder,
            () if shape is None else shape.ignored,
            stated=None if told is None else told.config,
            trust_remote_code=recipe.model.trust_remote_code,
        )
    except EngineError:
        raise
    except Exception as error:
        what = "transformers cannot use the config"
        raise checkpoint.unusable(folder, error, what) from error
    for part in (config, config.get_text_config()):
        part.return_dict = True  # how to answer is for the caller to say, who is the engine
        if hasattr(part, "rescale_every"):
            # RWKV would divide its weights in place, against overflow in float16, which the probe
            # sees: then they are no more the checkpoint's, and cannot be saved.
            part.rescale_every = 0
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


def _counter(session: Session) -> Callable[[Any, Any, dict[str, Any]], None]:
    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            ids = kwargs["inputs_embeds"][..., 0]
        session.forwarded_tokens += ids.numel()

    return count
