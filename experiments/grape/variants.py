"""The forms of GrAPE that its experiments compare: the paper's to the letter, the library's, and those between."""

from functools import partial

import jax

import jaxfa

# The paper's rule to the letter, whose noise is in the weights where they are fewer; and in activations everywhere.
LITERAL = jaxfa.rules.published_grape()
ACTIVATIONS = jaxfa.rules.published_grape(weights=False)
# The library's with a mean, and that with a tile: less noise, and a bias.
BEST = jaxfa.grape(averaging=jaxfa.rules.kalman())
WATCHED = jaxfa.grape(averaging=jaxfa.rules.kalman(), watch=True)
TILED = jaxfa.grape(averaging=jaxfa.rules.kalman(), tile=4)

_plain = partial(jaxfa.grape, scaling=0.0)
VARIANTS: dict[str, tuple[str, jaxfa.Rule]] = {
    "letter": ("GrAPE to the letter", LITERAL),
    "activations": ("GrAPE, activations perturbed", ACTIVATIONS),
    "tiled": ("GrAPE, scales, tiles and a Kalman mean", TILED),
    "full": ("GrAPE, scales and a Kalman mean", BEST),
    "per-unit": ("Columns of units", _plain(perturbation=jax.random.normal, norm_axis=1)),
    "signs": ("Signs", _plain()),
    "separate": ("One derivative for each layer", _plain(separate=True)),
    "scaled": ("Scales", _plain(scaling=0.3)),
    "tile-4": ("Tiles of 4", _plain(tile=4)),
    "tile-1": ("A matrix per channel", _plain(tile=1)),
    "tile-4-scaled": ("Tiles of 4, scales", jaxfa.grape(tile=4)),
    "mean-0.9": ("Running mean, .9", _plain(averaging=0.9)),
    "mean-0.98": ("Running mean, .98", _plain(averaging=0.98)),
    "kalman": ("Kalman mean", _plain(averaging=jaxfa.rules.kalman())),
    "tile-4-mean": ("Tiles of 4, running mean, .9", _plain(tile=4, averaging=0.9)),
    "tile-4-kalman": ("Tiles of 4, Kalman mean", _plain(tile=4, averaging=jaxfa.rules.kalman())),
    "magnitudes": ("Magnitudes kept", _plain(column_norm=False)),
    "fdfa": ("FDFA", jaxfa.fdfa()),
    "tile-4-fdfa": ("FDFA, tiles of 4", jaxfa.fdfa(tile=4)),
}
