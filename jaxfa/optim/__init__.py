"""One optax transformation for parameters and feedback, and steps of the true gradient now and then."""
