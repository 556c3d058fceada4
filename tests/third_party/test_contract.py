"""The engine's contract suite, on both plugins."""

# ruff: noqa: RUF012  (the base class declares them)

from acme_recipes.attention import Window
from acme_recipes.cache import Half

from engine.testing import PluginContract


class TestWindow(PluginContract):
    plugin = Window
    slot = "attention"
    options = {"size": 4}
    exact = False


class TestWideWindow(PluginContract):
    plugin = Window
    slot = "attention"
    options = {"size": 100}  # more than the suite's prompts, less than its model's positions


class TestHalf(PluginContract):
    plugin = Half
    slot = "cache"
    exact = False
