"""Run transformer models from YAML recipes: checked before loading, proven after.

    import engine

    session = engine.build(engine.compose("tiny", ["decode.max_new_tokens=64"]))
    for piece in session.stream("def add(a, b):"):
        print(piece, end="")

Importing this loads neither torch nor any plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.hookspecs import API_VERSION, hookimpl

if TYPE_CHECKING:
    from engine.builder import build
    from engine.recipe import Recipe, compose
    from engine.session import Session
    from engine.verdict import check

__version__ = "0.1.0"
__all__ = ["API_VERSION", "Recipe", "Session", "build", "check", "compose", "hookimpl"]

# No module has the name of what it exports here: importing `engine.check` as a module would
# replace the function of that name.
_HOMES = {
    "Recipe": "engine.recipe",
    "Session": "engine.session",
    "build": "engine.builder",
    "check": "engine.verdict",
    "compose": "engine.recipe",
}


def __getattr__(name: str) -> Any:
    # Lazily, so that plugin authors who need only `hookimpl` do not pay for Hydra.
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
