"""SSA: learning in SVD space, by Roy et al. 2025."""
