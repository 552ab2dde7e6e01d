"""What is said where forward mode is asked of what has a backward pass alone."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def backward_alone() -> Iterator[None]:
    """Says where forward mode is to be had, if it is asked of what has a backward pass alone."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "A feedback has a backward pass and no forward mode (jax.jvp, jax.jacfwd). Take the plain "
            "network, whose gradients are true: jaxfa.nn.plain(model); without Flax, feedback=None."
        ) from error
