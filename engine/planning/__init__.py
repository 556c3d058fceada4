"""Will it fit, how fast will it be, and what to change: reckoned without torch, before loading."""
