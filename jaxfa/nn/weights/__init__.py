"""Where a model contracts with weights, in Flax's layers or by itself, and how a rule sees them."""
