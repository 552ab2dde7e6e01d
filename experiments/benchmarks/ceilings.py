"""What this machine can do at most: the rate of a large matrix product, and that of a copy."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

_SIDE, _NUMBERS, _TIMES = 2048, 2**26, 5


class Ceilings(NamedTuple):
    """Rates beside which a step's are seen.

    Attributes:
      gigaflops: operations of a product of float32 matrices in a second, in units of 1e9.
      gigabytes: bytes that a copy reads and writes in a second, in units of 1e9.
    """

    gigaflops: float
    gigabytes: float

    def times(self, gigaflops: float, gigabytes: float) -> dict[str, float]:
        """The milliseconds that so many operations take as a product, and so many bytes as a copy."""
        return {"product": 1e3 * gigaflops / self.gigaflops, "copy": 1e3 * gigabytes / self.gigabytes}


def measure() -> Ceilings:
    """The best of a few tries of each."""
    matrix, numbers = jnp.ones((_SIDE, _SIDE)), jnp.ones(_NUMBERS)
    product, copy = jax.jit(lambda matrix: matrix @ matrix), jax.jit(lambda numbers: numbers + 1)
    seconds = _best(lambda: product(matrix)), _best(lambda: copy(numbers))
    return Ceilings(2 * _SIDE**3 / seconds[0] / 1e9, 2 * numbers.nbytes / seconds[1] / 1e9)


def _best(run: Callable[[], jax.Array]) -> float:
    run().block_until_ready()
    seconds = []
    for _ in range(_TIMES):
        started = time.perf_counter()
        run().block_until_ready()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
