"""Where keys and values of earlier tokens are kept."""
