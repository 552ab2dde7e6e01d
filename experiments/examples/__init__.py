"""Short programs that run."""
