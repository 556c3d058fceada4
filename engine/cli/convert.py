"""`engine convert`: a recipe's model as a checkpoint of its own."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from engine.cli import common


def convert(
    arguments: common.Arguments = None,
    to: Annotated[
        Path, typer.Option("--to", metavar="FOLDER", help="A new folder for the checkpoint.")
    ] = ...,  # type: ignore[assignment]
    json: common.Json = False,
) -> None:
    """Write the model that a recipe describes, heads pooled and weights packed, as a checkpoint.

    It is loaded again and compared, tensor by tensor, before the folder appears.

    engine convert tiny-4bit-gqa --to ./small

    engine run base model.path=./small -p "def add(a, b):"
    """
    from engine.loading.converting import convert as write

    recipe = common.compose(arguments)
    with common.progress() as tell:
        done = write(recipe, to, progress=tell)
    if json:
        common.print_json(
            {
                "folder": str(done.folder),
                "files": done.files,
                "bytes": sum(done.files.values()),
                "tensors": done.tensors,
                "recipe": list(done.recipe),
            }
        )
        return
    print(
        f"{done.folder}: {len(done.files)} files, {sum(done.files.values()):,} bytes\n"
        f"  loaded again, {done.tensors} tensors are the same bit for bit\n"
        f"  engine run {shlex.join(done.recipe)}"
    )
