"""Random variants of training images, inside the compiled step: functions of a key and of uint8 images (N, H, W, C)."""

import jax
import jax.numpy as jnp
from jax import lax


def crop_and_flip(key: jax.Array, images: jax.Array, *, padding: int = 4) -> jax.Array:
    """Shifts each image by up to so many pixels, black coming in, and mirrors half of them.

    Args:
      key: a PRNG key; it is consumed.
      images: ``(N, H, W, C)``.
      padding: the most pixels that an image is shifted by.

    Returns:
      Images of the same shape and dtype.
    """
    shift_key, flip_key = jax.random.split(key)
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    shifts = jax.random.randint(shift_key, (len(images), 2), 0, 2 * padding + 1)
    cropped = jax.vmap(lambda image, s: lax.dynamic_slice(image, (s[0], s[1], 0), images.shape[1:]))(padded, shifts)
    return _flip(flip_key, cropped)


def crop_flip_and_cutout(key: jax.Array, images: jax.Array, *, size: int) -> jax.Array:
    """As :func:`crop_and_flip`, and paints a square of each image in the batch's mean colour.

    The square's centre is anywhere in the image, so that part of it may lie outside.

    Args:
      key: a PRNG key; it is consumed.
      images: ``(N, H, W, C)``.
      size: the square's side in pixels.

    Returns:
      Images of the same shape and dtype.

    Source: DeVries, Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017,
    https://arxiv.org/abs/1708.04552
    """
    crop_key, centre_key = jax.random.split(key)
    count, height, width, _ = images.shape
    row_key, column_key = jax.random.split(centre_key)
    rows = jnp.arange(height)[None] - jax.random.randint(row_key, (count, 1), 0, height) + size // 2
    columns = jnp.arange(width)[None] - jax.random.randint(column_key, (count, 1), 0, width) + size // 2
    hidden = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
    # The mean colour is nearly zero once the images are normalised, which is what the original paints.
    colour = images.mean((0, 1, 2), keepdims=True).astype(images.dtype)
    return jnp.where(hidden[..., None], colour, crop_and_flip(crop_key, images))


def flip_and_rotate(key: jax.Array, images: jax.Array, *, degrees: float) -> jax.Array:
    """Mirrors half of the images and turns each by an angle of up to ``degrees`` either way, black coming in.

    Args:
      key: a PRNG key; it is consumed.
      images: ``(N, H, W, C)``.
      degrees: the largest angle.

    Returns:
      Images of the same shape and dtype; every pixel is that of the nearest place it came from.
    """
    flip_key, angle_key = jax.random.split(key)
    count, height, width, _ = images.shape
    angles = jnp.deg2rad(jax.random.uniform(angle_key, (count, 1, 1), minval=-degrees, maxval=degrees))
    middle, centre = (height - 1) / 2, (width - 1) / 2
    y, x = jnp.arange(height)[None, :, None] - middle, jnp.arange(width)[None, None, :] - centre
    rows = jnp.round(jnp.cos(angles) * y - jnp.sin(angles) * x + middle).astype(int)
    columns = jnp.round(jnp.sin(angles) * y + jnp.cos(angles) * x + centre).astype(int)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    # Indices beyond the end would be clamped, and negative ones wrap: all of those places are black.
    turned = jax.vmap(lambda image, r, c: image[r, c])(images, rows, columns)
    return _flip(flip_key, jnp.where(inside[..., None], turned, 0))


def _flip(key: jax.Array, images: jax.Array) -> jax.Array:
    mirrored = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)
