"""The rules: one method, one file, one paper. What several of them use is in ``shared``."""

from jaxfa.rules.grape import published_grape as published_grape
from jaxfa.rules.shared.averaging import kalman as kalman

__all__ = ["kalman", "published_grape"]
