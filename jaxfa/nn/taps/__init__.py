"""Where a direct rule taps a model: which places there are, which are chosen, and what is said of them."""
