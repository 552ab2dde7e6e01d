"""A model of your own, which knows nothing of jaxfa, trained by direct feedback alignment."""

import jax
import optax
from flax import nnx

import jaxfa


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.fc1 = nnx.Linear(64, 128, rngs=rngs)
        self.fc2 = nnx.Linear(128, 128, rngs=rngs)
        self.fc3 = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.fc3(nnx.relu(self.fc2(nnx.relu(self.fc1(x)))))


def loss_of(model, x, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()


x, labels = jax.random.normal(jax.random.key(0), (32, 64)), jax.numpy.arange(32) % 10
rule = jaxfa.dfa()
model = jaxfa.nn.attach(MLP(nnx.Rngs(0)), rule, rngs=nnx.Rngs(1), example=x)
learned = (nnx.Param, jaxfa.nn.Feedback)
optimizer = nnx.Optimizer(model, jaxfa.optimizer(optax.adam(1e-3), rule), wrt=learned)


@nnx.jit
def step(model, optimizer, x, labels):
    loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, learned))(model, x, labels)
    optimizer.update(model, grads)
    return loss


losses = [step(model, optimizer, x, labels) for _ in range(50)]
print(f"The loss falls from {losses[0]:.2f} to {losses[-1]:.2f}.")
print(model.coverage())
