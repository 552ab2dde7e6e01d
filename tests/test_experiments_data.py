"""Data sets: the embedded one, cached files, and what is said when there is none."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.common import data


def arrays(count=6, shape=(28, 28, 1)):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *shape), np.uint8)
    labels = rng.integers(0, 10, count).astype(np.uint8)
    return {"train_images": images, "train_labels": labels, "test_images": images[:2], "test_labels": labels[:2]}


def test_digits_are_real_stratified_and_the_same_every_time():
    digits, again = data.load("digits"), data.load("digits")
    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.test_images.shape == (360, 8, 8, 1)
    assert digits.train_images.dtype == np.uint8
    assert digits.train_images.max() == 16
    assert np.ptp(np.bincount(digits.test_labels)) <= 2
    np.testing.assert_array_equal(digits.train_images, again.train_images)
    whole = {image.tobytes() for image in digits.train_images}
    assert not any(image.tobytes() in whole for image in digits.test_images)
    assert not digits.augmented


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [("mnist", (28, 28, 1), 10), ("cifar100", (32, 32, 3), 100), ("imagenet64", (64, 64, 3), 1000)],
)
def test_cached_file_from_the_folder_or_the_variable(name, shape, classes, tmp_path, monkeypatch):
    expected = arrays(shape=shape)
    np.savez(tmp_path / f"{name}.npz", **expected)
    monkeypatch.setenv("JAXFA_DATA", str(tmp_path))
    for found in (data.load(name), data.load(name, tmp_path)):
        for key, value in expected.items():
            np.testing.assert_array_equal(getattr(found, key), value)
        assert found.train_labels.dtype == np.int32
        assert found.augmented == (name != "mnist")
        assert found.classes == classes


def test_missing_file_names_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(FileNotFoundError, match=r"jaxfa\[tfds\].*mnist\.npz with --data FOLDER or JAXFA_DATA.*digits"):
        data.load("mnist", tmp_path)


def test_tfds_fills_the_cache_once(tmp_path, monkeypatch):
    expected, calls = arrays(), []

    def load(name, *, split, batch_size):
        calls.append((name, split, batch_size))
        return {"image": expected[f"{split}_images"], "label": expected[f"{split}_labels"].astype(np.int64)}

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", SimpleNamespace(load=load, as_numpy=lambda tree: tree))
    for _ in range(2):
        found = data.load("fashion_mnist", tmp_path / "new")
    np.testing.assert_array_equal(found.train_images, expected["train_images"])
    assert calls == [("fashion_mnist", "train", -1), ("fashion_mnist", "test", -1)]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["fashion_mnist.npz"]


def test_tfds_fills_imagenet_from_its_validation_images(tmp_path, monkeypatch):
    images = arrays(shape=(64, 64, 3))["train_images"]

    def load(name, *, split, batch_size):
        assert name == "imagenet_resized/64x64"
        chosen = {"train": slice(None), "validation": slice(2)}[split]
        return {"image": images[chosen], "label": np.arange(994, 1000)[chosen]}

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", SimpleNamespace(load=load, as_numpy=lambda tree: tree))
    found = data.load("imagenet64", tmp_path)
    assert found.train_labels.tolist() == list(range(994, 1000))
    np.testing.assert_array_equal(found.test_images, images[:2])


def test_moments_of_a_channel_are_those_of_all_images():
    images = np.random.default_rng(0).integers(0, 256, (10_007, 2, 2, 3), np.uint8)
    mean, deviation = data.channel_moments(images)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(deviation, images.std((0, 1, 2)), rtol=1e-6)


def damaged(kind):
    found = arrays()
    match kind:
        case "no labels":
            del found["test_labels"]
        case "floats":
            found["train_images"] = found["train_images"].astype(np.float32)
        case "other length":
            found["train_labels"] = found["train_labels"][:-1]
        case "pickled":
            found["train_labels"] = np.array([{}] * 6, dtype=object)
    return found


@pytest.mark.parametrize("kind", ["no labels", "floats", "other length", "pickled", "truncated", "no archive"])
def test_damaged_file_is_refused(kind, tmp_path):
    path = tmp_path / "mnist.npz"
    np.savez(path, **damaged(kind))
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    if kind == "no archive":
        path.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=r"mnist\.npz.*Delete the file"):
        data.load("mnist", tmp_path)


def test_unknown_name_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"imagenet.*digits, mnist, fashion_mnist, cifar10, cifar100"):
        data.load("imagenet")


def test_hold_out_takes_from_the_training_set_alone():
    digits = data.load("digits")
    held = data.hold_out(digits)
    assert len(held.test_labels) == 144
    np.testing.assert_array_equal(np.concatenate([held.train_images, held.test_images]), digits.train_images)


def test_channel_moments_are_numpys():
    images = arrays(shape=(5, 7, 3))["train_images"]
    mean, deviation = data.channel_moments(images)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(deviation, images.std((0, 1, 2)), rtol=1e-6)
