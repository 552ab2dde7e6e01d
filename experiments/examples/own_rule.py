"""A rule of your own: feedback alignment through a blend of a learned matrix and the weights' signs."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxfa


@jaxfa.feedback_dataclass  # makes the class a frozen dataclass and a pytree
class Blended(jaxfa.LayerFeedback):
    b: jax.Array

    def matrix(self, w):  # the matrix that carries the error back in the place of w
        return 0.9 * self.b + 0.1 * jnp.sign(w)

    def signal(self, x, w, delta, dw):  # what the optimizer sees as the gradient of the feedback
        return Blended(dw)


def blended(learning_rate=1e-3):
    def init(key, w):
        return Blended(jax.nn.initializers.glorot_uniform()(key, w.shape, w.dtype))

    return jaxfa.LayerRule(init, transform=optax.sgd(learning_rate))


x = jax.random.normal(jax.random.key(0), (32, 64))
mlp = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(32, 10, rngs=nnx.Rngs(1)))
model = jaxfa.nn.attach(mlp, blended(), rngs=nnx.Rngs(2), example=x)
print(model.coverage())
