"""The engine's contract suite, on each plugin."""

# ruff: noqa: RUF012  (the base class declares them)

from acme_recipes.attention import Nearby
from acme_recipes.cache import Half
from acme_recipes.rows import Rows

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


class TestRows(PluginContract):
    plugin = Rows
    slot = "quantize"


class TestSomeRows(PluginContract):
    plugin = Rows
    slot = "quantize"
    options = {"skip_modules": ["down_proj", "model.layers.1"]}
