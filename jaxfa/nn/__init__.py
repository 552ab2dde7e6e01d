"""Puts a rule on a Flax NNX model."""
