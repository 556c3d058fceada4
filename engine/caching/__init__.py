"""Layers that keep keys and values, files of them, and when they may be used again."""
