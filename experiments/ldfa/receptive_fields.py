"""What a unit of an image network looks at, and whether that prefers an orientation."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

PAD = 64
SHOWN = 8


class Result(NamedTuple):
    """What the units of a network look at.

    Attributes:
      fields: receptive fields, ``(seeds, channels, side, side)``.
      selectivity: of every unit, ``(seeds, channels)``.
      symmetry: likewise.
      accuracy: last-epoch test accuracy, ``(seeds,)``; empty before training.
    """

    fields: np.ndarray
    selectivity: np.ndarray
    symmetry: np.ndarray
    accuracy: np.ndarray


def receptive_fields(layer: Callable[[jax.Array], jax.Array], images: jax.Array, side: int) -> jax.Array:
    """The mean gradient over images, in the image, of each channel's middle unit.

    Args:
      layer: images ``(N, H, W, 1)`` to channels ``(N, H, W, C)``.
      images: ``(N, H, W, 1)``.
      side: of the window around the unit that is kept, in pixels, an odd number.

    Returns:
      ``(C, side, side)``; zeros for what is outside the image.
    """
    middle, half = images.shape[1] // 2, side // 2

    def units(images: jax.Array) -> jax.Array:
        return layer(images)[:, middle, middle].mean(0)

    response, pull = jax.vjp(units, images)
    gradients = jax.vmap(lambda unit: pull(unit)[0].sum(0)[..., 0])(jnp.eye(len(response)))
    padded = jnp.pad(gradients, ((0, 0), (half, half), (half, half)))
    return padded[:, middle : middle + side, middle : middle + side]


def orientation_selectivity(fields: np.ndarray) -> np.ndarray:
    """How much the power of receptive fields lies at one orientation: ``|sum P exp(2 i angle)| / sum P``.

    ``P`` is the power spectrum inside the circle of the highest frequency, without the mean. It is one minus the
    circular variance.

    Args:
      fields: ``(C, side, side)``.

    Returns:
      ``(C,)``: 0 for no preference, 1 for a grating; NaN for a flat field.

    Source: Ringach, Shapley, Hawken, "Orientation selectivity in macaque V1: diversity and laminar dependence", 2002,
    https://doi.org/10.1523/JNEUROSCI.22-13-05639.2002
    """
    power = abs(np.fft.fft2(fields, (PAD, PAD))) ** 2
    frequency = np.fft.fftfreq(PAD)
    y, x = np.meshgrid(frequency, frequency, indexing="ij")
    weight = np.where((np.hypot(x, y) > 0) & (np.hypot(x, y) < 0.5), power, 0)
    with np.errstate(invalid="ignore"):
        return abs((weight * np.exp(2j * np.arctan2(y, x))).sum((1, 2))) / weight.sum((1, 2))


def radial_symmetry(fields: np.ndarray) -> np.ndarray:
    """The part of receptive fields' power that a function of the distance to their centre explains.

    The centre is that of the field's power; distances are binned by whole pixels.

    Args:
      fields: ``(C, side, side)``.

    Returns:
      ``(C,)``: 1 for centre and surround or a plain blob, towards 0 for an edge or a grating; NaN for a field of zeros.
    """
    return np.array([_explained(field) for field in fields])


def describe(fields: Sequence[np.ndarray], accuracy: Sequence[float] = ()) -> Result:
    """The numbers of receptive fields ``(channels, side, side)``, one array per seed."""
    selectivity, symmetry = ([of(one) for one in fields] for of in (orientation_selectivity, radial_symmetry))
    return Result(np.stack(fields), np.stack(selectivity), np.stack(symmetry), np.asarray(accuracy))


def by_seed(values: np.ndarray) -> np.ndarray:
    """The mean over the units of each seed that have a field, of ``(seeds, channels)``; no number where none has."""
    seen = [one[~np.isnan(one)] for one in values]
    return np.array([one.mean() for one in seen if one.size])


def _explained(field: np.ndarray) -> float:
    power = field**2
    if not power.sum():
        return float("nan")
    place = np.arange(len(field))
    centre = (power.sum(1) @ place / power.sum(), power.sum(0) @ place / power.sum())
    y, x = np.meshgrid(place - centre[0], place - centre[1], indexing="ij")
    ring = np.round(np.hypot(x, y)).astype(int).ravel()
    means = np.bincount(ring, field.ravel()) / np.maximum(np.bincount(ring), 1)
    return float((means[ring] ** 2).sum() / power.sum())


def figure(results: dict[str, Result]) -> Figure:
    """Receptive fields, a row per rank."""
    columns = min(SHOWN, *(one.fields.shape[1] for one in results.values()))
    drawn = Figure(figsize=(5.8, 0.68 * len(results) + 0.4), layout="constrained")
    grid = drawn.subplots(len(results), columns, squeeze=False)
    for row, (name, one) in zip(grid, results.items(), strict=True):
        for axes, field in zip(row, one.fields[0], strict=False):
            largest = abs(field).max() or 1.0
            axes.imshow(field, cmap="RdBu", vmin=-largest, vmax=largest)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return drawn
