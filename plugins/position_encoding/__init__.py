"""How positions are encoded."""
