"""Any model that anyone has: each of the zoo learns by each rule, or is refused in words that were foreseen."""

import jax
import numpy as np
import pytest

from tests.zoo import MODELS, outcomes
from tests.zoo.cell import COLUMNS, PLAIN, study, unstacked

FIRST = ("fa", "dfa(at=)")
REST = tuple(name for name in COLUMNS if name != "fa")
CLASSES = (PLAIN[True], *(name for name, column in COLUMNS.items() if column.classes))


@pytest.fixture(autouse=True)
def _as_people_run_them(x64):
    """Most code broadcasts silently; and what JAX or Flax has raised must not look as if jaxfa had."""
    with jax.numpy_rank_promotion("allow"):
        jax.config.update("jax_traceback_filtering", "off")
        yield
        jax.config.update("jax_traceback_filtering", "auto")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_learns_by_the_first_rules(name):
    check(name, FIRST)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_learns_by_the_other_rules(name):
    check(name, REST)


def test_the_page_is_the_data():
    found = outcomes.read()
    assert list(found) == list(MODELS)
    assert all(list(row) == list(COLUMNS) for row in found.values())
    assert outcomes.PAGE.read_text() == outcomes.page(found)


def check(name, columns):
    """All that the page says of these cells."""
    found, foreseen = study(MODELS[name], columns), outcomes.read()[name]
    came = {column: one if isinstance(one := found[column], str) else outcomes.WORKS for column in columns}
    assert came == {column: foreseen[column] for column in columns}
    holds({column: one for column, one in found.items() if not isinstance(one, str)})


def holds(found):
    """What is claimed of cells that work."""
    for column, cell in found.items():
        plain = found[PLAIN[column in CLASSES]]
        # SSA's layers are factors; around blocks that stream the compiler fuses other operations.
        agree = close if "ssa" in column or "streamed" in column else same
        agree(cell.outputs, plain.outputs)
        close(cell.learnt.outputs, plain.outputs)
        close(cell.learnt.written, plain.learnt.written)
        learns(cell.learnt, plain.learnt)
        # PEPITA's last layer gets the true error, but its activities are the second pass's.
        if cell.aligned is not None and "ssa" not in column and "pepita" not in column:
            table_is_true(cell.aligned.coverage().rows, cell.learnt.gradients, plain.learnt.gradients)
        # What is drawn for each feedback differs where that is stacked.
        if cell.reference and column not in ("grape(at=)", "forward_gradient(at=)"):
            close(unstacked(cell.learnt.gradients, cell.reference.gradients), cell.reference.gradients)
    if "streamed dfa(at=)" in found:
        close(found["streamed dfa(at=)"].learnt.gradients, found["dfa(at=)"].learnt.gradients)


def learns(learnt, plain):
    """No parameter that backpropagation teaches is left out, and a step moves it."""
    taught = [path for path, gradient in plain.gradients.items() if size(gradient) > 0]
    assert [path for path in taught if not 0 < size(learnt.gradients[path]) < np.inf] == []
    assert [path for path in taught if not 0 < size(learnt.step[path]) < np.inf] == []


def table_is_true(rows, ours, true):
    """Where the table says that an error comes exactly the gradient is the true one, and nowhere else."""
    for row in rows:
        path = next((path for path in (row.layer, f"{row.layer}/kernel".lstrip("/")) if path in true), None)
        if path is not None and size(true[path]) > 0:
            exact = np.allclose(ours[path], true[path], rtol=1e-8, atol=1e-11)
            arrives = row.arrives.removeprefix("other terms of the loss alone: ")
            assert exact == (arrives in ("exact: last", "exact", "backpropagation")), row


def size(tree):
    """The largest entry."""
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def same(ours, theirs):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def close(ours, theirs):
    """To rounding."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-11), ours, theirs)
