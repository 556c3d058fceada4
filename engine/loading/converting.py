"""Write the model that a recipe describes as a checkpoint, and prove that it loads again as it was.

What changes weights or config goes into the files: pooled heads, packed weights, stretched
positions. How they are run (attention, cache, decode) stays for a recipe to say.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from engine import recipe as recipes
from engine.builder import build
from engine.errors import EngineError, Problem, RecipeError, RuntimeFailure
from engine.loading.checkpoint import locate, some
from engine.loading.common import quiet
from engine.recipe import Recipe
from engine.registry import name_of
from engine.rules import Rule
from engine.tensors import digests
from engine.verdict import check

if TYPE_CHECKING:
    from engine.builder import Progress
    from engine.session import Session

WRITTEN = ("load", "quantize", "heads", "position_encoding")
"""Slots whose choices go into the files."""

RUN = ("attention", "cache", "decode", "task", "observe")
"""Slots whose choices stay for a recipe."""

NO_CACHE = {"override cache": "none"}

REFUSED = {
    "weights.unsavable": Rule(
        code="convert-unsavable",
        why="its library has no form in which packed weights could be saved",
        hint="quantize=torchao, quantize=bitsandbytes or quantize=none",
        source="transformers quantizers/quantizer_quanto.py, is_serializable",
        seen="transformers 5.23.0, 2026-11-22",
    ),
    "position.bias": Rule(
        code="convert-position",
        why="attention adds it while it runs, and no checkpoint says that it should",
        hint="position_encoding=native here, and the choice in the recipe that runs the new folder",
        source="transformers PreTrainedConfig has no such key",
        seen="transformers 5.23.0, 2026-11-22",
    ),
    "position.scores": Rule(
        code="convert-position",
        why="attention computes it while it runs, and no checkpoint says that it should",
        hint="position_encoding=native here, and the choice in the recipe that runs the new folder",
        source="transformers PreTrainedConfig has no such key",
        seen="transformers 5.23.0, 2026-11-22",
    ),
    "load.offloaded": Rule(
        code="convert-offloaded",
        why="what waits on the disk is not in the model's state, with which its copy is compared",
        hint="load.device_map=null, on a machine with more memory",
        source="accelerate hooks.py, AlignDevicesHook.init_hook",
        seen="accelerate 1.15.0, 2026-11-22",
    ),
}
"""Trait → why what has it cannot be written."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A checkpoint that was written, loaded again and found the same."""

    folder: Path
    files: Mapping[str, int]
    """Name → bytes."""
    tensors: int
    """Compared, buffers included."""
    recipe: Sequence[str]
    """Words for the command line: the recipe that runs it."""


def convert(recipe: Recipe, folder: Path, *, progress: Progress = lambda step: None) -> Converted:
    """Build a recipe, save its model to a new folder, and compare what loads from there.

    The folder appears when all of that is done, with SHA256SUMS of its files.

    Raises:
        EngineError: as `engine.build` does.
        RecipeError: for a folder with something in it, and what cannot be saved.
        RuntimeFailure: where writing fails, or something else loads than was saved.
    """
    folder = _vacant(folder)
    _verify_savable(recipe)
    with ExitStack() as stack:
        try:
            part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            stack.callback(shutil.rmtree, part, ignore_errors=True)
            with build(_reduced(recipe, stack, recipe.model.path), progress=progress) as session:
                progress(f"writing {folder}")
                _save(session, part)
                before = _fingerprint(session)
            del session
            gc.collect()  # so that never two models are in memory
            with build(_reduced(recipe, stack, str(part)), progress=progress) as session:
                after = _fingerprint(session)
            if differing := [n for n in sorted({*before, *after}) if before.get(n) != after.get(n)]:
                raise RuntimeFailure(
                    f"saved and loaded again, {len(differing)} of {len(before)} tensors are not "
                    f"the same: {some(differing)}; nothing was written",
                    hint="leave out a choice: " + ", ".join(f"{slot}=…" for slot in WRITTEN[1:]),
                )
            if folder.exists():
                folder.rmdir()
            part.rename(folder)
        except OSError as error:
            raise RuntimeFailure(
                f"{folder} cannot be written: {error.strerror or error}", hint="--to FOLDER"
            ) from error
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    return Converted(folder=folder, files=files, tensors=len(before), recipe=_words(recipe, folder))


def _vacant(folder: Path) -> Path:
    """Return the folder's full path, once nothing is there that would be lost."""
    folder = Path(os.path.realpath(folder.expanduser()))  # where a link leads to
    if folder.is_dir() and any(folder.iterdir()):
        raise RecipeError(f"--to {folder}: there is something in it", hint="--to a new folder")
    if folder.is_mount():
        hint = f"--to {folder / 'model'}"
        raise RecipeError(f"--to {folder}: a mounted folder cannot be replaced", hint=hint)
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"--to {folder}: that is a file", hint="--to a new folder")
    if not folder.parent.is_dir():
        raise RecipeError(f"--to {folder}: there is no folder {folder.parent}", hint="make it")
    return folder


def _verify_savable(recipe: Recipe) -> None:
    verdict = check(recipe)
    verdict.raise_for_problems()
    problems = [
        rule.problem(one.slot, f"engine convert does not work with {one.slot}={one.choice}")
        for one in verdict.hooks.chosen
        for trait, rule in REFUSED.items()
        if trait in getattr(one.plugin, "provides", ())
    ]
    if recipe.model.trust_remote_code:
        message = "engine convert does not copy code, and this checkpoint brings its own"
        hint = "a model that transformers knows"
        problems.append(Problem(message=message, hint=hint, code="convert-code"))
    if problems:
        raise RecipeError(problems)


def _reduced(recipe: Recipe, stack: ExitStack, path: str) -> Recipe:
    """Return a recipe for the model alone: what goes into the files, or, of these, what is there.

    How the model is run does not matter here, and could ask for more: a draft model, a compiler.
    """
    values = yaml.safe_load(recipe.text)
    written = WRITTEN if path == recipe.model.path else ()
    model = values["model"] | ({} if written else {"path": path, "revision": None})
    kept = {slot: values[slot] for slot in written} | {"model": model, "seed": recipe.seed}
    kept["target"] = values["target"]
    # By the plugins' names: a preset may be where only its own recipe finds it.
    kinds = {slot: type(getattr(recipe, slot)) for slot in written}
    plugins = [
        {f"override {slot}": name_of(slot, kind, recipe.choices[slot])}
        for slot, kind in kinds.items()
    ]
    file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "converting.yaml"
    # Without a cache: some positions are rotated outside of the model where there is one.
    text = yaml.safe_dump({"defaults": ["base", *plugins, NO_CACHE, "_self_"], **kept})
    file.write_text(text, encoding="utf-8")
    return recipes.compose(file)


def _save(session: Session, folder: Path) -> None:
    from transformers import GenerationConfig

    model, asked = session.model, session.recipe.model
    source = locate(asked.path, asked.revision, download=False)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_serializable():
        raise RecipeError(
            REFUSED["weights.unsavable"].problem("quantize", type(quantizer).__name__)
        )
    # The engine's own settings are not the model's: its file is copied as it was.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    try:
        with quiet():
            # What came packed has no way back to other names, and transformers would look for one.
            packed = quantizer is not None and quantizer.pre_quantized
            model.save_pretrained(folder, save_original_format=not packed)
            session.tokenizer.save_pretrained(folder)
    except (OSError, EngineError):
        raise
    except Exception as error:
        raise RuntimeFailure(
            f"transformers cannot save this {model.config.model_type}: "
            f"{type(error).__name__}: {error}",
            hint="quantize=none, or another of its choices left out",
        ) from error
    if source is not None and (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    lines = [f"{_sha256(file)}  {file.name}\n" for file in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.iterdir()):  # temporary folders are for one user's eyes alone
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fingerprint(session: Session) -> dict[str, str]:
    """Return a digest of all that the model computes with: weights, scales, buffers, and logits."""
    import torch

    model: Any = session.model
    held = {**model.state_dict(), **dict(model.named_buffers())}
    with torch.no_grad():
        ids = torch.arange(8, device=session.device)[None] % session.embedding_rows
        held["logits of a probe"] = model(input_ids=ids, use_cache=False).logits
    return digests(held)


def _words(recipe: Recipe, folder: Path) -> list[str]:
    """Return the words behind `engine run` that run the new folder as the recipe says."""
    usual = recipes.compose("base", ["model.path=x"])
    choices = [
        f"{slot}={recipe.choices.get(slot, 'null')}"
        for slot in RUN
        if recipe.choices.get(slot) != usual.choices.get(slot)
    ]
    chosen = recipes.compose("base", ["model.path=x", *choices])
    options = [
        f"{slot}.{field.name}={_typed(value)}"
        for slot in RUN
        if (plugin := getattr(recipe, slot)) is not None
        for field in dataclasses.fields(plugin)
        if (value := getattr(plugin, field.name)) != getattr(getattr(chosen, slot), field.name)
    ]
    dtype = recipe.model.dtype.value
    return [
        "base",
        f"model.path={folder}",
        *([] if dtype == "auto" else [f"model.dtype={dtype}"]),
        *choices,
        *options,
    ]


def _typed(value: Any) -> str:
    """Phrase a value as an override in Hydra's grammar, where keys of mappings have no quotes."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_typed(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_typed, value)) + "]"
    return json.dumps(getattr(value, "value", value), ensure_ascii=False)
