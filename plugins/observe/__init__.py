"""Who looks on."""
