"""Masks, scores and windows: what the choices of `attention` share."""
