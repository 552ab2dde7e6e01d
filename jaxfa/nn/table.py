"""The table that tells how a model learns."""

from typing import NamedTuple

# A deep model breaks the same law in each of its layers.
_TOLD = 8


class Row(NamedTuple):
    """One matrix of parameters that the forward pass contracts with, once or more often.

    Attributes:
      layer: the path of the layer.
      shape: the weights' shape.
      arrives: how the error gets to its output; "other terms of the loss" are what the model writes or returns beside
        its logits, whose gradient ends where a tap is.
      leaves: how the error goes on to what is below.
      feedback: the feedback's class and size, where it has one.
      learns: how that learns: "fixed", "from the batch", "by refine", which is ``model.refine(key, x)``, or else.
    """

    layer: str
    shape: tuple[int, ...]
    arrives: str
    leaves: str
    feedback: str
    learns: str


class Coverage(NamedTuple):
    """A printable table.

    Attributes:
      rows: a :class:`Row` for each matrix of parameters, in the order of the forward pass.
      violations: a sentence for each contraction that would stay backpropagation although nobody allowed it.
      note: where a direct rule taps that was not told, and why there.
    """

    rows: tuple[Row, ...]
    violations: tuple[str, ...]
    note: str = ""

    def refuse(self, advice: str = "") -> None:
        """Raises a ``ValueError`` of the first violations, if there are any; the advice is what to do about all."""
        if self.violations:
            head, rest = "This model would not learn by the rule alone.", self.violations[_TOLD:]
            more = f"- and {len(rest)} more." if rest else ""
            raise ValueError("\n".join([head, *self.violations[:_TOLD], *filter(None, [more, advice]), "", str(self)]))

    def __str__(self) -> str:
        """The table as text."""
        head = ("layer", "weights", "error arrives", "error leaves", "feedback", "learns")
        lines = [head, *((row.layer, str(row.shape), *row[2:]) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = (map(str.ljust, line, widths) for line in lines)
        table = "\n".join("  ".join(line).rstrip() for line in padded)
        return f"{table}\n{self.note}" if self.note else table
