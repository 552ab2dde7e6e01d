"""Globs of layer paths, such as ``"blocks/*/conv1"``."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any


def path_name(path: Iterable[Any]) -> str:
    """A path as one string; of a key that is a tuple, as spectral norm's, the parts stand between dots."""
    return "/".join(".".join(map(str, key)) if isinstance(key, tuple) else str(key) for key in path)


def matches(path: str, patterns: tuple[str, ...], *, under: bool = False) -> bool:
    """Whether a path matches one of the globs, segment by segment; with ``under``, it or something above it."""
    parts = path.split("/")
    for pattern in patterns:
        globs = pattern.split("/")
        fits = len(globs) == len(parts) or (under and len(globs) < len(parts))
        if fits and all(fnmatchcase(part, glob) for part, glob in zip(parts, globs, strict=False)):
            return True
    return False
