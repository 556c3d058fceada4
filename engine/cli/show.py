"""`engine show`: the composed recipe."""

from __future__ import annotations

from engine.cli import common


def show(arguments: common.Arguments = None, json: common.Json = False) -> None:
    """Print everything that a recipe and its overrides come to, as YAML.

    engine show tiny cache=static

    engine show base > recipes/mine.yaml
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
    choices = " ".join(f"{slot}={choice}" for slot, choice in recipe.choices.items())
    print(f"# {recipe.name} ({recipe.file})")
    print(f"# {choices}")
    print(recipe.text, end="")
