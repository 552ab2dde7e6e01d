"""A Flax model as functions of the arrays in it."""
