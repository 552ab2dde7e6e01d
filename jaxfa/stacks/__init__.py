"""Stacks of equal blocks under direct feedback: orders of learning on one device, the pipeline over several."""

from jaxfa.stacks.pipelining import mesh as mesh
from jaxfa.stacks.pipelining import pipeline as pipeline
from jaxfa.stacks.schedules import Schedule as Schedule
from jaxfa.stacks.schedules import dispatch as dispatch
from jaxfa.stacks.schedules import parallel as parallel
from jaxfa.stacks.schedules import stored as stored
from jaxfa.stacks.schedules import stream as stream
from jaxfa.stacks.stack import direct_stack as direct_stack
from jaxfa.stacks.updates import update_stack as update_stack

__all__ = [
    "Schedule", "direct_stack", "dispatch", "mesh", "parallel", "pipeline", "stored", "stream", "update_stack",
]  # fmt: skip
