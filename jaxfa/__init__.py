"""Train neural networks without backpropagation: keep the model, the loss and the optimizer; choose a feedback rule."""

import importlib
import typing

from jaxfa import factored as factored
from jaxfa import rules as rules
from jaxfa import stacks as stacks
from jaxfa.base import DirectFeedback as DirectFeedback
from jaxfa.base import DirectRule as DirectRule
from jaxfa.base import FixedFeedback as FixedFeedback
from jaxfa.base import Layer as Layer
from jaxfa.base import LayerFeedback as LayerFeedback
from jaxfa.base import LayerRule as LayerRule
from jaxfa.base import Rule as Rule
from jaxfa.base import feedback_dataclass as feedback_dataclass
from jaxfa.layers import conv as conv
from jaxfa.layers import linear as linear
from jaxfa.measure import conservation as conservation
from jaxfa.measure import diagnostics as diagnostics
from jaxfa.ops import with_feedback as with_feedback
from jaxfa.optim.calibration import calibrate as calibrate
from jaxfa.optim.optimizer import optimizer as optimizer
from jaxfa.rules.auglocal import auglocal as auglocal
from jaxfa.rules.backprop import backprop as backprop
from jaxfa.rules.dfa import DirectMatrix as DirectMatrix
from jaxfa.rules.dfa import dfa as dfa
from jaxfa.rules.dkp import dkp as dkp
from jaxfa.rules.dldfa import dldfa as dldfa
from jaxfa.rules.drtp import drtp as drtp
from jaxfa.rules.fa import fa as fa
from jaxfa.rules.fdfa import fdfa as fdfa
from jaxfa.rules.forward_gradient import forward_gradient as forward_gradient
from jaxfa.rules.grape import grape as grape
from jaxfa.rules.kolen_pollack import kolen_pollack as kolen_pollack
from jaxfa.rules.ldfa import ldfa as ldfa
from jaxfa.rules.local_classifier import local_classifier as local_classifier
from jaxfa.rules.normative_ldfa import normative_ldfa as normative_ldfa
from jaxfa.rules.pepita import pepita as pepita
from jaxfa.rules.predsim import predsim as predsim
from jaxfa.rules.sign_symmetric import brsf as brsf
from jaxfa.rules.sign_symmetric import frsf as frsf
from jaxfa.rules.sign_symmetric import usf as usf
from jaxfa.rules.ssa import ssa as ssa
from jaxfa.rules.weight_mirror import weight_mirror as weight_mirror
from jaxfa.stacks.stack import direct_stack as direct_stack
from jaxfa.stacks.updates import update_stack as update_stack
from jaxfa.wire import direct as direct
from jaxfa.wire import error_wire as error_wire
from jaxfa.wire import with_wire as with_wire

__version__ = "0.1.0"
__all__ = [
    "DirectFeedback", "DirectMatrix", "DirectRule", "FixedFeedback", "Layer", "LayerFeedback", "LayerRule", "Rule",
    "auglocal", "backprop", "brsf", "calibrate", "conservation", "conv", "dfa", "diagnostics", "direct",
    "direct_stack", "dkp", "dldfa", "drtp", "error_wire", "fa", "factored", "fdfa", "feedback_dataclass",
    "forward_gradient", "frsf", "grape", "kolen_pollack", "ldfa", "linear", "local_classifier", "normative_ldfa",
    "optimizer", "pepita", "predsim", "rules", "ssa", "stacks", "update_stack", "usf", "weight_mirror", "with_feedback",
    "with_wire",
]  # fmt: skip


def __getattr__(name: str) -> typing.Any:
    """Imports ``jaxfa.nn``, and with it Flax, when it is first asked for."""
    if name == "nn":
        return importlib.import_module("jaxfa.nn")
    raise AttributeError(f"module 'jaxfa' has no attribute {name!r}")
