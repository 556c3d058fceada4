"""The loop, sampling, drafts and text: what the choices of `decode` share."""
