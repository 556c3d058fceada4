"""Recipes and presets that come with the engine: plain YAML, and the embedded model."""
