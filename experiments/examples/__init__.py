"""Short programs that run as they stand; README and docs quote them."""
