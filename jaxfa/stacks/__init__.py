"""Stacks of equal blocks under direct feedback: orders of learning on one device, the pipeline over several."""

from jaxfa.stacks.blocks import direct_stack as direct_stack
from jaxfa.stacks.parallel import mesh as mesh
from jaxfa.stacks.parallel import pipeline as pipeline
from jaxfa.stacks.updates import update_stack as update_stack

__all__ = ["direct_stack", "mesh", "pipeline", "update_stack"]
