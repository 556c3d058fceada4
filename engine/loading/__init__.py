"""Find, verify and load a model's files: what the choices of `load` share."""
