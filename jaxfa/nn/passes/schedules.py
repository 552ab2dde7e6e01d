"""How an attached model runs by each schedule of :mod:`jaxfa.stacks`."""

from collections.abc import Callable
from functools import partial, singledispatch
from typing import Any

from flax import nnx

from jaxfa.base import DirectRule, Rule
from jaxfa.nn.passes.dispatch import call_dispatched, check_dispatches
from jaxfa.nn.passes.modulate import call_modulated
from jaxfa.nn.passes.stream import call_streamed, check_streams
from jaxfa.stacks.schedules import Dispatch, Stored, Stream


@singledispatch
def forward_by(schedule: Any, model: nnx.Module, rule: Rule) -> Callable[..., Any] | None:
    """The function that runs a tapped model by a schedule; None is the one that every rule has.

    Raises:
      ValueError: if no model runs by it, or this one does not.
    """
    raise ValueError(
        f"attach takes schedule=jaxfa.stacks.stored, jaxfa.stacks.stream or jaxfa.stacks.dispatch(mesh), a value and "
        f"no string; got {schedule!r}."
    )


@forward_by.register
def _(schedule: Stored, model: nnx.Module, rule: Rule) -> Callable[..., Any] | None:
    return call_modulated if isinstance(rule, DirectRule) and rule.modulate is not None else None


@forward_by.register
def _(schedule: Stream, model: nnx.Module, rule: Rule) -> Callable[..., Any] | None:
    check_streams(model, rule, schedule)
    return call_streamed


@forward_by.register
def _(schedule: Dispatch, model: nnx.Module, rule: Rule) -> Callable[..., Any] | None:
    check_dispatches(model, rule, schedule)
    return partial(call_dispatched, schedule.mesh)
