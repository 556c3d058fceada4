"""Recipes that `engine run` finds by name."""
