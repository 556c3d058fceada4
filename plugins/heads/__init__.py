"""How many key/value heads there are."""
