"""Image data sets as arrays: scikit-learn's digits, which need no file, and cached ``.npz`` files of the others.

A cached file ``FOLDER/NAME.npz`` holds uint8 ``train_images`` and ``test_images`` (N, H, W, C) and integer
``train_labels`` and ``test_labels`` (N,). The folder is what ``--data`` or ``JAXFA_DATA`` names, else ``./data``. Where
a file is missing, TFDS makes it, once.

ImageNet is that of Chrabaszcz, Loshchilov and Hutter (2017, https://arxiv.org/abs/1707.08819), every image 64 x 64:
15.7 GB, which fit on one accelerator of 80 GB beside a training. The test images are its 50,000 validation images,
which published accuracies are of.
"""

import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

DatasetName = Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "imagenet64"]

_CLASSES = {"digits": 10, "mnist": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100, "imagenet64": 1000}
_NATURAL = ("cifar10", "cifar100", "imagenet64")
# TFDS's name and its split for testing, where they are not ours.
_TFDS = {"imagenet64": ("imagenet_resized/64x64", "validation")}
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


class Dataset(NamedTuple):
    """A data set for image classification, or of text, where every token has the next one as its label.

    Attributes:
      train_images: uint8 ``(N, H, W, C)``, or tokens ``(N, T)``; NumPy's, or JAX's once on the device.
      train_labels: int32 ``(N,)``, or ``(N, T)``.
      test_images: ``(M, ...)``, likewise.
      test_labels: ``(M, ...)``, likewise.
      classes: how many labels there are.
      augmented: whether training shifts and mirrors the images: natural ones, not digits.
    """

    train_images: Any
    train_labels: Any
    test_images: Any
    test_labels: Any
    classes: int
    augmented: bool = False


def load(name: DatasetName, folder: Path | None = None) -> Dataset:
    """Loads a data set; prepares its cached file first if that is missing.

    Args:
      name: one of ``DatasetName``.
      folder: where the cached files are; by default what ``JAXFA_DATA`` names, else ``./data``.

    Returns:
      A :class:`Dataset`.

    Raises:
      ValueError: if the name is unknown or the cached file is damaged.
      FileNotFoundError: if there is no cached file and no TFDS to make it.
    """
    if name not in get_args(DatasetName):
        raise ValueError(f"Unknown data set {name!r}; choose one of {', '.join(get_args(DatasetName))}.")
    if name == "digits":
        return _digits()
    path = (folder or Path(os.environ.get("JAXFA_DATA", "data"))) / f"{name}.npz"
    if not path.exists():
        _prepare(name, path)
    return _read(name, path)


def hold_out(data: Dataset, fraction: float = 0.1) -> Dataset:
    """The data set with the end of its training images in place of the test images, for every choice that is tuned.

    Args:
      data: a :class:`Dataset`, which comes shuffled.
      fraction: how much of the training images to hold out.

    Returns:
      A :class:`Dataset` that holds no test image.
    """
    kept = len(data.train_labels) - round(fraction * len(data.train_labels))
    return data._replace(
        train_images=data.train_images[:kept],
        train_labels=data.train_labels[:kept],
        test_images=data.train_images[kept:],
        test_labels=data.train_labels[kept:],
    )


def first(data: Dataset, images: int | None, test_images: int | None) -> Dataset:
    """The data set's first training and test images; None is all of them."""
    return data._replace(
        train_images=data.train_images[:images],
        train_labels=data.train_labels[:images],
        test_images=data.test_images[:test_images],
        test_labels=data.test_labels[:test_images],
    )


def shrink(data: Dataset, factor: int) -> Dataset:
    """The data set with every square of ``factor`` pixels a side averaged; NumPy's arrays.

    Raises:
      ValueError: if the images are not made of whole squares.
    """
    if factor == 1:
        return data

    def smaller(images: np.ndarray) -> np.ndarray:
        n, height, width, channels = images.shape
        if height % factor or width % factor:
            raise ValueError(
                f"Images of {height} x {width} pixels have no whole squares of {factor}; choose a divisor."
            )
        squares = images.reshape(n, height // factor, factor, width // factor, factor, channels)
        return np.rint(squares.mean((2, 4))).astype(np.uint8)

    return data._replace(train_images=smaller(data.train_images), test_images=smaller(data.test_images))


def on_device(data: Dataset) -> Dataset:
    """The data set with its arrays on the device, once for all trainings."""
    return data._replace(**{name: jax.device_put(getattr(data, name)) for name in _ARRAYS})


def channel_moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the standard deviation of every channel of uint8 images ``(N, H, W, C)``, each ``(C,)``."""
    # From the histogram: exact, and without a copy of the images in wider numbers, but for some at a time.
    parts = [images[i : i + 10_000] for i in range(0, len(images), 10_000)]
    channels = range(images.shape[-1])
    counts = np.stack([sum(np.bincount(part[..., c].ravel(), minlength=256) for part in parts) for c in channels])
    levels = np.arange(256)
    mean = counts @ levels / counts.sum(1)
    variance = counts @ levels**2 / counts.sum(1) - mean**2
    return mean.astype(np.float32), np.sqrt(np.maximum(variance, 1e-12)).astype(np.float32)


def normalize(images: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """What gives every channel of images the mean 0 and the deviation 1 that it has over these, uint8 of four axes."""
    mean, deviation = (moment.reshape(1, 1, 1, -1) for moment in channel_moments(images))
    return lambda images: (images.astype(jnp.float32) - mean) / deviation


def _digits() -> Dataset:
    digits = load_digits()
    images, labels = digits.images[..., None].astype(np.uint8), digits.target.astype(np.int32)
    split = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = split
    return Dataset(train_images, train_labels, test_images, test_labels, _CLASSES["digits"])


def _read(name: str, path: Path) -> Dataset:
    train_images, train_labels, test_images, test_labels = read_arrays(path, _ARRAYS)
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{path} must hold uint8 images (N, H, W, C) and labels (N,), got {images.dtype} {images.shape} and "
                f"{labels.shape}. Delete the file and prepare it again."
            )
    train, test = (labels.astype(np.int32) for labels in (train_labels, test_labels))
    return Dataset(train_images, train, test_images, test, _CLASSES[name], name in _NATURAL)


def read_arrays(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """The arrays of a cached file.

    Raises:
      ValueError: if it is damaged, or one of them is missing.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return [file[name] for name in names]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged ({error}): expected {', '.join(names)}. Delete the file and prepare it again."
        ) from error


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Caches arrays in a file, which has its name when it is complete: a kill half way leaves no half one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, allow_pickle=False, **arrays)
    partial.replace(path)


def tensorflow_datasets(path: Path, packages: str, otherwise: str) -> Any:
    """TFDS, to prepare a file that is not there.

    Raises:
      FileNotFoundError: if it is not installed.
    """
    try:
        return import_module("tensorflow_datasets")
    except ImportError as error:
        raise FileNotFoundError(
            f"No cached data set at {path}. Where a network is, install TFDS (pip install {packages}) and run this "
            f"again; or name the folder that holds {otherwise}."
        ) from error


def _prepare(name: str, path: Path) -> None:
    otherwise = f"{path.name} with --data FOLDER or JAXFA_DATA; or choose digits, which needs no file"
    tfds = tensorflow_datasets(path, "'jaxfa[tfds]'", otherwise)
    arrays: dict[str, np.ndarray] = {}
    source, test = _TFDS.get(name, (name, "test"))
    for split, found in (("train", "train"), ("test", test)):
        whole = tfds.as_numpy(tfds.load(source, split=found, batch_size=-1))
        arrays |= {f"{split}_images": whole["image"], f"{split}_labels": whole["label"].astype(np.int32)}
    save_arrays(path, arrays)
