"""Plugins and recipes for Recipe Engine."""
