"""Which values the fields of a configuration may have.

Whole numbers are from 1, others above 0, and of choices there is one or more, unless a field's annotation says
otherwise: ``Annotated[float, FROM_ZERO]``.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, NamedTuple


class Bound(NamedTuple):
    """What every number, or choice, of a field must be.

    Attributes:
      said: the end of the sentence "NAME must be ...".
      holds: ``value -> whether it is``.
    """

    said: str
    holds: Callable[[Any], bool]


COUNT = Bound("at least 1", lambda value: value >= 1)
POSITIVE = Bound("positive", lambda value: value > 0)
FROM_ZERO = Bound("at least 0", lambda value: value >= 0)
SHARE = Bound("in (0, 1]", lambda value: 0 < value <= 1)
MAY_BE_EMPTY = "may be empty"


def between(least: int, most: int) -> Bound:
    """Whole numbers from ``least`` to ``most``."""
    return Bound(f"from {least} to {most}", lambda value: least <= value <= most)


def among(choices: Collection[str]) -> Bound:
    """Names of a table."""
    return Bound(f"one of {', '.join(choices)}", lambda name: name in choices)


def check(config: Any) -> None:
    """Raises a ``ValueError`` if a field of a configuration has a value that it may not have; None is no value."""
    for field in dataclasses.fields(config):
        value, said = getattr(config, field.name), getattr(field.type, "__metadata__", ())
        if value == () and field.default != () and MAY_BE_EMPTY not in said:
            raise ValueError(f"{field.name} must name one or more, got none.")
        own = next((one for one in said if isinstance(one, Bound)), None)
        for one in value if isinstance(value, tuple) else (value,):
            bound = own or {int: COUNT, float: POSITIVE}.get(type(one))
            if bound and one is not None and not bound.holds(one):
                raise ValueError(f"{field.name} must be {bound.said}, got {value}.")
