"""The models whose config.json comes with recipes: `model/*.yaml` in the folders of recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.recipe import search_folders


def known_config(path: str) -> Mapping[str, Any]:
    """Return what recipes know of a model's config.json, nearest folders first; {} if nothing.

    Args:
        path: as `model.path` has it.
    """
    import yaml

    for folder in search_folders():
        for file in sorted((folder / "model").glob("*.yaml")):
            try:
                text = file.read_text("utf-8")
                if f"path: {path}\n" not in text:
                    continue  # parsing all of them takes half a second
                found = yaml.safe_load(text)
                if found["path"] == path and isinstance(found["config"], dict):
                    return found["config"]
            except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
                continue  # composing a recipe with it says what is wrong with it
    return {}
