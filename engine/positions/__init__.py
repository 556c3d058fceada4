"""Frequencies and tables of positions: what the choices of `position_encoding` share."""
