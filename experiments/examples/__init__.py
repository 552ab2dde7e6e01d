"""Short scripts that run as they stand; README and docs quote them."""
