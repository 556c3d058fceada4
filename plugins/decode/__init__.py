"""How tokens become more tokens."""
