"""Which layers are packed, and what that costs: what the choices of `quantize` share."""
