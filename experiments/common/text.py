"""Texts as data sets whose labels are the next tokens: Tiny Shakespeare by characters, WikiText by words.

A cached file ``FOLDER/NAME.npz`` holds a text once and for all as whole numbers: ``train`` and ``test`` ``(tokens,)``
and the ``vocabulary`` that they count in. The folder is that of the images. Where a file is missing, it is made: from
the compressed text where that lies in the folder (for Shakespeare ``tinyshakespeare.txt.xz``), else by TFDS.

Characters: all 65 that occur; the last tenth of the text is the test set. Words: what white space separates, and an
``<eos>`` at the end of every line, as the authors count, with their ``<unk>`` for rare words; what the training text
does not have becomes ``<unk>``, too, and so do all but the most frequent words where the vocabulary is cut. Fewer
words are easier to guess: perplexities of different vocabularies do not compare.
"""

import io
import itertools
import lzma
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from experiments.common.data import Dataset, read_arrays, save_arrays, tensorflow_datasets

TextName = Literal["shakespeare", "wikitext2_small", "wikitext2", "wikitext103"]

UNKNOWN, END = "<unk>", "<eos>"


class Source(NamedTuple):
    """Where a text comes from.

    Attributes:
      tfds: its name there.
      splits: there; characters are joined, words are those to train on and those to test on.
      files: the names of the compressed texts that may lie in the folder instead.
    """

    tfds: str
    splits: tuple[str, ...]
    files: tuple[str, ...] = ()


_WIKITEXT2 = "huggingface:wikitext/wikitext-2-v1"
_SOURCES: dict[TextName, Source] = {
    "shakespeare": Source("tiny_shakespeare", ("train", "validation", "test"), ("tinyshakespeare.txt.xz",)),
    "wikitext2_small": Source(
        _WIKITEXT2, ("validation", "test"), ("wikitext2_valid.tokens.txt.xz", "wikitext2_test.tokens.txt.xz")
    ),
    "wikitext2": Source(_WIKITEXT2, ("train", "test")),
    "wikitext103": Source("huggingface:wikitext/wikitext-103-v1", ("train", "test")),
}


class Corpus(NamedTuple):
    """A text in two parts.

    Attributes:
      train: whole numbers ``(tokens,)``.
      test: likewise.
      vocabulary: what they stand for: characters in their order, or ``<unk>`` and words by falling frequency.
    """

    train: np.ndarray
    test: np.ndarray
    vocabulary: np.ndarray


def load(name: TextName, folder: Path | None = None, *, context: int, vocabulary: int | None = None) -> Dataset:
    """Loads a text cut into windows, each with the tokens that follow its own as labels.

    Args:
      name: one of ``TextName``; ``wikitext2_small`` is WikiText-2 without its training text: it trains on the
        validation text and is tested on the test text, a fiftieth of the real thing's corpus.
      folder: where the cached files are; by default what ``JAXFA_DATA`` names, else ``./data``.
      context: tokens of a window.
      vocabulary: how many different words to keep; by default all.

    Returns:
      A :class:`Dataset` with tokens ``(N, context)`` in place of images.

    Raises:
      ValueError: if the name is unknown, the cached file is damaged, the text is shorter than one window, or the
        vocabulary cannot be cut so.
      FileNotFoundError: if there is no cached file and nothing to make it of.
    """
    corpus = read(name, folder)
    kept = min(vocabulary or len(corpus.vocabulary), len(corpus.vocabulary))
    if kept < len(corpus.vocabulary) and (kept < 2 or corpus.vocabulary[0] != UNKNOWN):
        raise ValueError(
            f"{name} cannot be cut to a vocabulary of {kept}: words need {UNKNOWN} and one more, characters all "
            f"{len(corpus.vocabulary)}."
        )
    train, test = (_windows(np.where(part < kept, part, 0), context) for part in (corpus.train, corpus.test))
    return Dataset(*train, *test, classes=kept)


def read(name: TextName, folder: Path | None = None) -> Corpus:
    """Reads a text's cached file; makes it first if that is missing.

    Args:
      name: one of ``TextName``.
      folder: as for :func:`load`.

    Returns:
      A :class:`Corpus`.

    Raises:
      ValueError: if the name is unknown or the cached file is damaged.
      FileNotFoundError: if there is no cached file and nothing to make it of.
    """
    if name not in _SOURCES:
        raise ValueError(f"Unknown text {name!r}; choose one of {', '.join(_SOURCES)}.")
    path = (folder or Path(os.environ.get("JAXFA_DATA", "data"))) / f"{name}.npz"
    if not path.exists():
        save_arrays(path, _prepare(name, path)._asdict())
    corpus = Corpus(*read_arrays(path, Corpus._fields))
    parts = (corpus.train, corpus.test)
    if any(part.ndim != 1 or part.dtype.kind != "u" or part.max(initial=0) >= len(corpus.vocabulary) for part in parts):
        raise ValueError(
            f"{path} must hold whole numbers (tokens,) below its {len(corpus.vocabulary)} words, got {parts[0].dtype} "
            f"{parts[0].shape} and {parts[1].dtype} {parts[1].shape}. Delete the file and prepare it again."
        )
    return corpus


def characters(text: str, test_fraction: float = 0.1) -> Corpus:
    """A text by characters, the end of which is the test part."""
    vocabulary, tokens = np.unique(np.array(list(text)), return_inverse=True)
    kept = len(tokens) - round(test_fraction * len(tokens))
    tokens = tokens.astype(_dtype(vocabulary))
    return Corpus(tokens[:kept], tokens[kept:], vocabulary)


def words(train: Iterable[str], test: Iterable[str]) -> Corpus:
    """The lines of two texts by words; the vocabulary is the training text's."""
    # Numbers at once, in order of appearance: a list of 10^8 strings would fill the memory.
    seen = {UNKNOWN: 0}
    tokens = np.fromiter((seen.setdefault(word, len(seen)) for word in _words_of(train)), np.int32)
    counts = np.bincount(tokens, minlength=len(seen))
    counts[0] = len(tokens) + 1
    order = np.argsort(-counts, kind="stable")
    vocabulary = np.array(list(seen))[order]
    numbers = np.argsort(order).astype(_dtype(vocabulary))
    tested = np.fromiter((numbers[seen.get(word, 0)] for word in _words_of(test)), numbers.dtype)
    return Corpus(numbers[tokens], tested, vocabulary)


def _words_of(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield from line.split()
        yield END


def _windows(tokens: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows ``(N, context)`` that do not overlap, and the same one token later; the odd remainder is left out."""
    count = (len(tokens) - 1) // context
    if count < 1:
        raise ValueError(f"A text of {len(tokens)} tokens has no window of {context} and the token after it.")
    length = count * context
    return tokens[:length].reshape(count, context), tokens[1 : length + 1].reshape(count, context).astype(np.int32)


def _dtype(vocabulary: np.ndarray) -> np.dtype:
    return np.min_scalar_type(len(vocabulary) - 1)


def _prepare(name: TextName, path: Path) -> Corpus:
    source = _SOURCES[name]
    files = [path.parent / file for file in source.files]
    if files and all(file.exists() for file in files):
        parts: list[Iterable[str]] = [io.StringIO(lzma.decompress(file.read_bytes()).decode()) for file in files]
    else:
        parts = _download(source, path)
    return characters("".join(itertools.chain(*parts))) if name == "shakespeare" else words(*parts)


def _download(source: Source, path: Path) -> list[Iterable[str]]:
    given = " or ".join(filter(None, (path.name, " and ".join(source.files))))
    tfds = tensorflow_datasets(path, "'jaxfa[tfds]' datasets", f"{given} with --data FOLDER or JAXFA_DATA")

    def lines(split: str) -> Iterator[str]:
        for example in tfds.as_numpy(tfds.load(source.tfds, split=split)):
            yield example["text"].decode()

    return [lines(split) for split in source.splits]
