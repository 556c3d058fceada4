"""`engine show`: the composed recipe."""

from __future__ import annotations

from engine.cli import common


def show(arguments: common.Arguments = None, json: common.Json = False) -> None:
    """Print everything that a recipe and its overrides come to: a recipe again.

    engine show tiny cache=static

    engine show tiny cache=static > recipes/mine.yaml

    engine run mine -p "def add(a, b):"
    """
    recipe = common.compose(arguments)
    if json:
        import yaml

        common.print_json(
            {
                "name": recipe.name,
                "file": recipe.file,
                "digest": recipe.digest,
                "choices": recipe.choices,
                "recipe": yaml.safe_load(recipe.text),
            }
        )
        return
    print(f"# {recipe.name} ({recipe.file})")
    print("defaults:\n  - base")
    for slot, choice in recipe.choices.items():
        print(f"  - override {slot}: {choice}")
    print("  - _self_")
    print(recipe.text, end="")
