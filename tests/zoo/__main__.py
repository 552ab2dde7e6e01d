"""Writes down what works with what: ``python -m tests.zoo``, or with the names of some models for these alone."""

import sys

import jax

from tests.zoo import MODELS, outcomes
from tests.zoo.cell import COLUMNS, study


def main(names: list[str]) -> None:
    """Tries every column on the models, and writes data and page anew."""
    found = outcomes.read()
    for name in names or MODELS:
        learnt = study(MODELS[name], COLUMNS)
        found[name] = {column: one if isinstance(one := learnt[column], str) else outcomes.WORKS for column in COLUMNS}
        outcomes.write({name: found[name] for name in MODELS if name in found})
        print(f"{name}: {list(found[name].values()).count(outcomes.WORKS)} of {len(COLUMNS)}", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_traceback_filtering", "off")
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        main(sys.argv[1:])
