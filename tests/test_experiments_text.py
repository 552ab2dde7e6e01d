"""Texts as data sets, and the causal transformer that reads them."""

import lzma
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxfa
import jaxfa.nn
from experiments.common import data, text
from experiments.common.task import Task, cross_entropy
from experiments.common.trainer import Trainer
from experiments.models.gpt import GPT

PLAY = "To be, or not to be:\nthat is the question.\n" * 12
TRAIN = ["a rose is a rose \n", "\n", "a <unk> is a rose\n"]
TEST = ["a thorn is a rose"]


def packed(folder, name, content):
    (folder / name).write_bytes(lzma.compress(content.encode()))


@pytest.fixture
def play(tmp_path):
    packed(tmp_path, "tinyshakespeare.txt.xz", PLAY)
    return tmp_path


def test_characters_make_the_text_again(play):
    corpus = text.read("shakespeare", play)
    assert "".join(corpus.vocabulary[np.concatenate([corpus.train, corpus.test])]) == PLAY
    assert len(corpus.test) == round(len(PLAY) / 10)
    assert corpus.train.dtype == np.uint8
    (play / "tinyshakespeare.txt.xz").unlink()
    np.testing.assert_array_equal(text.read("shakespeare", play).train, corpus.train)
    assert [path.name for path in play.iterdir()] == ["shakespeare.npz"]


def test_words_make_the_text_again_but_for_those_that_training_never_saw():
    corpus = text.words(TRAIN, TEST)
    assert list(corpus.vocabulary[:4]) == ["<unk>", "a", "rose", "<eos>"]
    assert list(corpus.vocabulary[corpus.train]) == [*" <eos> ".join(map(str.strip, TRAIN)).split(), "<eos>"]
    assert list(corpus.vocabulary[corpus.test]) == ["a", "<unk>", "is", "a", "rose", "<eos>"]


def test_a_window_is_labelled_with_the_tokens_after_its_own(play):
    corpus, found = text.read("shakespeare", play), text.load("shakespeare", play, context=7)
    np.testing.assert_array_equal(found.train_images.ravel(), corpus.train[: found.train_images.size])
    np.testing.assert_array_equal(found.train_images.ravel()[1:], found.train_labels.ravel()[:-1])
    assert found.train_labels.flat[-1] == corpus.train[found.train_labels.size]
    assert found.test_images.shape == found.test_labels.shape == ((len(corpus.test) - 1) // 7, 7)
    assert found.classes == len(corpus.vocabulary)


def test_a_cut_vocabulary_keeps_the_most_frequent_words(tmp_path):
    packed(tmp_path, "wikitext2_valid.tokens.txt.xz", "".join(TRAIN))
    packed(tmp_path, "wikitext2_test.tokens.txt.xz", "".join(TEST))
    whole = text.load("wikitext2_small", tmp_path, context=2)
    cut = text.load("wikitext2_small", tmp_path, context=2, vocabulary=3)
    assert (whole.classes, cut.classes) == (5, 3)
    kept = whole.train_images < 3
    np.testing.assert_array_equal(cut.train_images, np.where(kept, whole.train_images, 0))
    assert not kept.all()
    with pytest.raises(ValueError, match="cut to a vocabulary of 1"):
        text.load("wikitext2_small", tmp_path, context=2, vocabulary=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"context": 500}, "no window of 500"), ({"context": 7, "vocabulary": 3}, "characters all 1[0-9]")],
)
def test_windows_that_a_text_does_not_have_are_refused(play, options, message):
    with pytest.raises(ValueError, match=message):
        text.load("shakespeare", play, **options)


def test_a_missing_text_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(
        FileNotFoundError,
        match=r"jaxfa\[tfds\].* shakespeare.npz or tinyshakespeare.txt.xz with --data FOLDER or JAXFA",
    ):
        text.load("shakespeare", tmp_path, context=7)
    with pytest.raises(FileNotFoundError, match=r"Where a network is.*holds wikitext103.npz with"):
        text.load("wikitext103", tmp_path, context=7)
    with pytest.raises(ValueError, match="Unknown text 'ulysses'; choose one of shakespeare"):
        text.load("ulysses", tmp_path, context=7)


def test_tfds_fills_the_cache_once(tmp_path, monkeypatch):
    calls = []

    def load(name, *, split):
        calls.append((name, split))
        return [{"text": line.encode()} for line in (TRAIN if split == "train" else TEST)]

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", SimpleNamespace(load=load, as_numpy=lambda tree: tree))
    for _ in range(2):
        found = text.read("wikitext103", tmp_path)
    for ours, expected in zip(found, text.words(TRAIN, TEST), strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert calls == [("huggingface:wikitext/wikitext-103-v1", split) for split in ("train", "test")]


def damaged(kind):
    arrays = {"train": np.zeros(9, np.uint8), "test": np.zeros(9, np.uint8), "vocabulary": np.array(["a", "b"])}
    match kind:
        case "no test":
            del arrays["test"]
        case "beyond the vocabulary":
            arrays["train"] = arrays["train"] + np.uint8(2)
        case "floats":
            arrays["test"] = arrays["test"].astype(np.float32)
        case "pickled":
            arrays["vocabulary"] = np.array([{}], dtype=object)
    return arrays


@pytest.mark.parametrize("kind", ["no test", "beyond the vocabulary", "floats", "pickled"])
def test_a_damaged_text_is_refused(kind, tmp_path):
    np.savez(tmp_path / "shakespeare.npz", **damaged(kind))
    with pytest.raises(ValueError, match="Delete the file and prepare it again"):
        text.read("shakespeare", tmp_path)


@pytest.fixture(scope="module")
def gpt():
    model = GPT(5, context=6, width=8, depth=2, heads=2, rngs=nnx.Rngs(0))
    return nnx.jit(model)


def test_no_token_sees_a_later_one(gpt):
    tokens = jnp.array([[0, 1, 2, 3, 4, 0]])
    before, after = gpt(tokens), gpt(tokens.at[0, 3].set(1))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert jnp.all(jnp.any(before[:, 3:] != after[:, 3:], -1))
    np.testing.assert_allclose(gpt(tokens[:, :4]), before[:, :4], atol=1e-5)


@pytest.mark.parametrize("tokens", [np.zeros((2, 7), np.uint8), np.zeros((2, 6), np.float32), np.zeros(6, np.uint8)])
def test_other_inputs_are_refused(gpt, tokens):
    with pytest.raises(ValueError, match=r"whole numbers \(N, T\) with T up to 6"):
        gpt(jnp.asarray(tokens))


def test_accuracy_and_loss_are_of_tokens(play):
    found = data.first(text.load("shakespeare", play, context=6), 9, 7)

    def make(rngs):
        return GPT(found.classes, context=6, width=8, depth=1, heads=2, rngs=rngs)

    task = Task(make, jaxfa.backprop(), optax.adam(1e-3), found, 4, inputs=lambda tokens: tokens)
    trainer = Trainer(task, (3,))
    state = trainer.init()
    measured = trainer.evaluate(state)
    model = jaxfa.nn.plain(trainer._attach(jax.random.key(3)))
    logits, labels = model(jnp.asarray(found.test_images)), jnp.asarray(found.test_labels)
    np.testing.assert_allclose(measured["test_loss"], [cross_entropy(logits, labels)], rtol=1e-5)
    np.testing.assert_allclose(measured["test_accuracy"], [jnp.mean(logits.argmax(-1) == labels)])
    assert {float(angle[0]) for angle in measured["angle"].values()} == {0.0}
