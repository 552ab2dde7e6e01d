"""What each rule's backward pass does, in NumPy alone, from the papers' equations: no line of jaxfa, and no autodiff.

A reference is ``(net, i, feedback, delta, e) -> (error at xs[i], learning signals by field)``: ``delta`` is the error
at the output of layer ``i``, which ``xs[i]`` enters, and ``e`` that of the logits.
"""

import math

import numpy as np

from tests.oracles import local
from tests.oracles.networks import dense
from tests.oracles.phases import whole


def direct(h, b, e):
    """``e B^T``: ``dh_i = sum_k B_ik e_k``."""
    return (e @ b.reshape(-1, e.shape[-1]).T).reshape(h.shape)


def oja(p, errors):
    """``(1 - p p^T) C p / tr C`` with the covariance ``C`` of the errors' rows."""
    c = np.cov(errors.reshape(-1, errors.shape[-1]).T, bias=True)
    return (np.eye(len(c)) - p @ p.T) @ c @ p / np.trace(c)


def by_weights(net, i, feedback, delta, e):
    return net.back(i, net.w[i], delta), {}


def by_matrix(net, i, feedback, delta, e):
    return net.back(i, feedback.b, delta), {}


def kolen_pollack(net, i, feedback, delta, e):
    return net.back(i, feedback.b, delta), {"b": net.layers[i].to_weights(net.xs[i], feedback.b, delta)}


def usf(net, i, feedback, delta, e):
    *window, n, m = net.w[i].shape
    return net.back(i, math.sqrt(2 / (math.prod(window) * (n + m))) * np.sign(net.w[i]), delta), {}


def by_magnitude(net, i, feedback, delta, e):
    return net.back(i, feedback.magnitude * np.sign(net.w[i]), delta), {}


def learned(feedback, p, q):
    """The signals of the factors that learn."""
    return {"p": p if getattr(feedback, "learn_p", False) else 0, "q": q if getattr(feedback, "learn_q", False) else 0}


def ldfa(net, i, feedback, delta, e):
    thin = delta @ feedback.p  # the layer's own operation with r outputs takes it to the input
    q = net.layers[i].to_weights(net.xs[i], feedback.q, thin)
    return net.back(i, feedback.q, thin), learned(feedback, -oja(feedback.p, delta), q)


def by_factors(net, i, feedback, delta, e):
    return net.back(i, dense(feedback.b), delta), {}


def by_lift(net, i, feedback, delta, e):
    delta = e if feedback.lift is None else direct(net.hs[i], feedback.lift, e)
    return net.back(i, dense(feedback.b), delta), {}


def dfa(net, i, feedback, delta, e):
    return direct(net.xs[i], feedback.b, e), {}


def dfa_shared(net, i, feedback, delta, e):
    n = math.prod(net.xs[i].shape[1:])
    return direct(net.xs[i], feedback.b[:n] / math.sqrt(n), e), {}


def dfa_hashed(net, i, feedback, delta, e):
    n, buckets = math.prod(net.xs[i].shape[1:]), feedback.b.shape[1]
    b = np.stack([sign * feedback.b[:n, c % buckets] for c, sign in enumerate(feedback.signs)], 1)
    return direct(net.xs[i], b / math.sqrt(n), e), {}


def dkp(net, i, feedback, delta, e):
    return direct(net.xs[i], feedback.b, e), {"b": np.tensordot(net.xs[i], e, (0, 0))}


def drtp(net, i, feedback, delta, e):
    return direct(net.xs[i], feedback.b, -net.targets / len(e)), {}


def dldfa(net, i, feedback, delta, e):
    thin = e @ feedback.p
    q = np.tensordot(net.xs[i], thin, (0, 0))
    return direct(net.xs[i], feedback.q, thin), learned(feedback, -oja(feedback.p, e), q)


def by_tile(net, i, feedback, delta, e):
    return direct(net.xs[i], whole(feedback.b, net.xs[i].shape[1:]), e), {}


def local_classifier(net, i, feedback, delta, e):
    return local.classify(net.xs[i], feedback.sides, feedback, net.targets)


def fixed_classifier(net, i, feedback, delta, e):
    return local_classifier(net, i, feedback, delta, e)[0], {}


def predsim(net, i, feedback, delta, e):
    return local.predsim(net.xs[i], feedback, net.targets)


def auglocal(net, i, feedback, delta, e):
    return local.augmented(net.xs[i], feedback, net.targets, net.layers[i:-1])


def at(signals, path):
    """What is in a reference's signals at a leaf of a feedback; zero where they have nothing."""
    for key in path:
        signals = (
            signals[key.idx] if hasattr(key, "idx") else signals.get(getattr(key, "name", getattr(key, "key", "")), {})
        )
    return 0 if isinstance(signals, dict) else signals


REFERENCES = {
    "backprop": by_weights,
    "fa": by_matrix,
    "usf": usf,
    "brsf": by_magnitude,
    "frsf": by_magnitude,
    "kolen_pollack": kolen_pollack,
    "weight_mirror": by_matrix,
    "dfa": dfa,
    "dfa_shared": dfa_shared,
    "dfa_hashed": dfa_hashed,
    "dkp": dkp,
    "drtp": drtp,
    "ldfa": ldfa,
    "ldfa_fixed": ldfa,
    "normative_ldfa": ldfa,
    "grape": by_tile,
    "fdfa": by_tile,
    "ssa": by_lift,
    "ssa_sequential": by_factors,
    "ssa_transported": by_factors,
    "dldfa": dldfa,
    "local_classifier": local_classifier,
    "local_classifier_fixed": fixed_classifier,
    "predsim": predsim,
    "auglocal": auglocal,
}
