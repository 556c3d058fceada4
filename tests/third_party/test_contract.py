"""The engine's contract suite, on both plugins."""

# ruff: noqa: RUF012  (the base class declares them)

from acme_recipes.attention import Nearby
from acme_recipes.cache import Half

from engine.testing import PluginContract


class TestNearby(PluginContract):
    plugin = Nearby
    slot = "attention"
    options = {"size": 4}
    exact = False


class TestWideNearby(PluginContract):
    plugin = Nearby
    slot = "attention"
    options = {"size": 100}  # more than the suite's prompts, less than its model's positions


class TestHalf(PluginContract):
    plugin = Half
    slot = "cache"
    exact = False
