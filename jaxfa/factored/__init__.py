"""Weights kept as the factors of their singular value decomposition, and what trains, thins and joins them."""

from jaxfa.factored.manifold import stiefel as stiefel
from jaxfa.factored.pruning import hoyer_penalty as hoyer_penalty
from jaxfa.factored.pruning import prune as prune
from jaxfa.factored.pruning import ranks as ranks
from jaxfa.factored.svd import Factors as Factors
from jaxfa.factored.svd import factorise as factorise
from jaxfa.factored.svd import orthonormal_factors as orthonormal_factors

__all__ = ["Factors", "factorise", "hoyer_penalty", "orthonormal_factors", "prune", "ranks", "stiefel"]
