"""SSA's local losses and steps in NumPy alone; weights are ``u s v`` of one layer, ``b`` its feedback of the same."""

import numpy as np


def polar(a):
    """The nearest matrix with orthonormal columns."""
    u, _, vt = np.linalg.svd(a, full_matrices=False)
    return u @ vt


def tangent(u, d):
    """The part of ``d`` along the manifold: ``d - u sym(u^T d)``."""
    inner = u.T @ d
    return d - u @ (inner + inner.T) / 2


def gradient(g, w, b, *, alpha, beta, gamma, project):
    """Of ``alpha L_CE + beta L_align + gamma L_ortho``; ``g`` is ``L_CE``'s, and without feedback nothing is aligned.

    ``L_ortho``'s gradient, which is all across the manifold, joins behind the projection.
    """
    found = {}
    for name in ("u", "s", "v"):
        own = getattr(w, name)
        found[name] = alpha * g[name] + (0 if b is None else 2 * beta * (own - getattr(b, name)))
        if name != "s":
            found[name] = tangent(own, found[name]) if project else found[name]
            found[name] = found[name] + gamma * 4 * own @ (own.T @ own - np.eye(own.shape[1]))
    return found


def step(d, w, *, project, retract):
    """Steps of ``u`` and ``v`` end on the manifold, wherever they set out from."""
    found = dict(d)
    for name in ("u", "v") if retract else ():
        own = getattr(w, name)
        along = tangent(own, d[name]) if project else d[name]
        found[name] = polar(own + along) - own
    return found
