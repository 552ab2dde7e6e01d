"""Augmentations: functions of a key, of pixels that were there."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import augment
from experiments.common.augment import crop_and_flip


def pictures():
    return jnp.asarray(np.random.default_rng(0).integers(1, 200, (32, 9, 9, 3), dtype=np.uint8))


def test_augmentation_shifts_and_mirrors_and_is_a_function_of_its_key():
    images = jnp.arange(1, 1 + 64 * 36, dtype=jnp.int32).reshape(64, 6, 6, 1)
    out = crop_and_flip(jax.random.key(0), images)
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    np.testing.assert_array_equal(out, crop_and_flip(jax.random.key(0), images))
    for before, after in zip(np.asarray(images), np.asarray(out), strict=True):
        assert set(after[after > 0]) <= set(before.ravel())
    steps = np.asarray(out)[:, :, 1:] - np.asarray(out)[:, :, :-1]
    assert {1, -1} <= set(steps.ravel().tolist())


def test_cutout_paints_a_square_at_most():
    images = jnp.full((64, 12, 12, 1), 100, jnp.uint8).at[:, 0, 0].set(200)
    out = augment.crop_flip_and_cutout(jax.random.key(0), images, size=5)
    plain = augment.crop_and_flip(jax.random.split(jax.random.key(0))[0], images)
    changed = np.asarray((out != plain).any(-1))
    assert out.dtype == images.dtype
    assert changed.sum((1, 2)).max() <= 25
    assert all(np.ptp(np.nonzero(image.any(axis))[0]) <= 4 for image in changed for axis in (0, 1) if image.any())


def test_rotation_turns_by_the_nearest_pixel_and_no_angle_only_mirrors():
    images = pictures()
    still = np.asarray(augment.flip_and_rotate(jax.random.key(0), images, degrees=0.0))
    mirrored = [(a == b[:, ::-1]).all() for a, b in zip(still, np.asarray(images), strict=True)]
    same = [(a == b).all() for a, b in zip(still, np.asarray(images), strict=True)]
    assert 5 < sum(mirrored) < 27
    assert np.logical_or(mirrored, same).all()

    turned = np.asarray(augment.flip_and_rotate(jax.random.key(0), images, degrees=30.0))
    assert turned.dtype == np.uint8
    np.testing.assert_array_equal(turned[:, 4, 4], np.asarray(images)[:, 4, 4])
    assert (turned == 0).all(-1).any((1, 2)).mean() > 0.5
    for before, after in zip(np.asarray(images), turned, strict=True):
        assert set(after[after > 0]) <= set(before.ravel())


@pytest.mark.parametrize(
    "vary",
    [partial(augment.flip_and_rotate, degrees=10.0), partial(augment.crop_flip_and_cutout, size=4)],
)
def test_augmentations_are_functions_of_their_keys(vary):
    images = pictures()
    np.testing.assert_array_equal(vary(jax.random.key(1), images), vary(jax.random.key(1), images))
    assert (vary(jax.random.key(1), images) != vary(jax.random.key(2), images)).any()
