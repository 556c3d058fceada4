"""In how many bits the weights are kept."""
