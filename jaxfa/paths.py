"""Layers by name: a path as one string, and the globs that users give."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any


def path_name(path: Iterable[Any]) -> str:
    """A path as one string; of a key that is a tuple, as spectral norm's, the parts stand between dots."""
    return "/".join(".".join(map(str, key)) if isinstance(key, tuple) else str(key) for key in path)


def matches(path: str, patterns: tuple[str, ...], *, under: bool = False) -> bool:
    """Whether a path matches one of the globs, segment by segment; with ``under``, it or something above it."""
    parts = path.split("/")
    lengths = range(1, len(parts) + 1) if under else [len(parts)]
    split = [pattern.split("/") for pattern in patterns]
    return any(len(globs) in lengths and all(map(fnmatchcase, parts, globs)) for globs in split)
