"""Train neural networks without backpropagation: keep the model, the loss and the optimizer; choose a feedback rule."""

import importlib
import typing

from jaxfa import conservation as conservation
from jaxfa import diagnostics as diagnostics
from jaxfa import retractions as retractions
from jaxfa.averaging import kalman as kalman
from jaxfa.base import DirectFeedback as DirectFeedback
from jaxfa.base import FixedFeedback as FixedFeedback
from jaxfa.base import Layer as Layer
from jaxfa.base import LayerFeedback as LayerFeedback
from jaxfa.base import Rule as Rule
from jaxfa.base import backprop as backprop
from jaxfa.base import register as register
from jaxfa.calibration import calibrate as calibrate
from jaxfa.dfa import DirectMatrix as DirectMatrix
from jaxfa.dfa import dfa as dfa
from jaxfa.dkp import dkp as dkp
from jaxfa.dldfa import dldfa as dldfa
from jaxfa.drtp import drtp as drtp
from jaxfa.fa import fa as fa
from jaxfa.fdfa import fdfa as fdfa
from jaxfa.grape import grape as grape
from jaxfa.kolen_pollack import kolen_pollack as kolen_pollack
from jaxfa.layers import conv as conv
from jaxfa.layers import linear as linear
from jaxfa.ldfa import ldfa as ldfa
from jaxfa.ldfa import normative_ldfa as normative_ldfa
from jaxfa.ops import direct as direct
from jaxfa.ops import error_wire as error_wire
from jaxfa.ops import with_feedback as with_feedback
from jaxfa.optim import optimizer as optimizer
from jaxfa.rank import hoyer_penalty as hoyer_penalty
from jaxfa.rank import prune as prune
from jaxfa.rank import ranks as ranks
from jaxfa.sign_symmetric import brsf as brsf
from jaxfa.sign_symmetric import frsf as frsf
from jaxfa.sign_symmetric import usf as usf
from jaxfa.ssa import ssa as ssa
from jaxfa.stack import direct_stack as direct_stack
from jaxfa.stack_update import update_stack as update_stack
from jaxfa.stiefel import stiefel as stiefel
from jaxfa.svd import Factors as Factors
from jaxfa.svd import factorise as factorise
from jaxfa.svd import orthonormal_factors as orthonormal_factors
from jaxfa.weight_mirror import weight_mirror as weight_mirror

__version__ = "0.1.0"
__all__ = [
    "DirectFeedback", "DirectMatrix", "Factors", "FixedFeedback", "Layer", "LayerFeedback", "Rule", "backprop",
    "brsf", "calibrate", "conservation", "conv", "dfa", "diagnostics", "direct", "direct_stack", "dkp", "dldfa", "drtp",
    "error_wire", "fa", "factorise", "fdfa", "frsf", "grape", "hoyer_penalty", "kalman", "kolen_pollack", "ldfa",
    "linear", "normative_ldfa", "optimizer", "orthonormal_factors", "prune", "ranks", "register", "retractions", "ssa",
    "stiefel", "update_stack", "usf", "weight_mirror", "with_feedback",
]  # fmt: skip


def __getattr__(name: str) -> typing.Any:
    """Imports ``jaxfa.nn``, and with it Flax, or ``jaxfa.parallel`` when they are first asked for."""
    if name in ("nn", "parallel"):
        return importlib.import_module(f"jaxfa.{name}")
    raise AttributeError(f"module 'jaxfa' has no attribute {name!r}")
