"""The rules: one method, one file, one paper. What several of them use is in ``shared``."""

from jaxfa.base import ForwardPass as ForwardPass
from jaxfa.rules.grape import published_grape as published_grape
from jaxfa.rules.pepita import modulated as modulated
from jaxfa.rules.shared.averaging import kalman as kalman
from jaxfa.rules.shared.topography import topographic as topographic

__all__ = ["ForwardPass", "kalman", "modulated", "published_grape", "topographic"]
