"""What a field of a configuration may hold: by its kind, or as its annotation says."""

import dataclasses
from typing import Annotated

import pytest

from experiments.common.bounds import FROM_ZERO, MAY_BE_EMPTY, SHARE, among, between
from experiments.common.experiment import Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    count: int = 1
    rate: float | None = None
    widths: tuple[int, ...] = (1, 2)
    hidden: Annotated[tuple[int, ...], MAY_BE_EMPTY] = (3,)
    classes: Annotated[tuple[int, ...], between(2, 5)] = ()
    decay: Annotated[float, FROM_ZERO] = 0.0
    names: Annotated[tuple[str, ...], among(("a", "b"))] = ("a",)
    energies: Annotated[tuple[float, ...], SHARE] = (0.5,)
    on: bool = False


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("count", 0, "count must be at least 1, got 0."),
        ("rate", 0.0, "rate must be positive, got 0.0."),
        ("rate", float("nan"), "rate must be positive, got nan."),
        ("widths", (), "widths must name one or more, got none."),
        ("widths", (1, 0), r"widths must be at least 1, got \(1, 0\)."),
        ("hidden", (0,), r"hidden must be at least 1, got \(0,\)."),
        ("classes", (6,), r"classes must be from 2 to 5, got \(6,\)."),
        ("decay", -0.1, "decay must be at least 0, got -0.1."),
        ("names", ("a", "c"), r"names must be one of a, b, got \('a', 'c'\)."),
        ("energies", (1.0, 0.0), r"energies must be in \(0, 1\], got \(1.0, 0.0\)."),
    ],
)
def test_what_a_field_may_not_hold_is_refused(field, value, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Config(**{field: value})


def test_the_bounds_themselves_are_inside():
    inside = {"count": 1, "rate": 1e-9, "hidden": (), "classes": (2, 5), "decay": 0.0, "energies": (1.0,), "on": False}
    config = Config(**inside, names=("b", "a"))
    assert dataclasses.asdict(config) == dataclasses.asdict(Config()) | inside | {"names": ("b", "a")}
