"""A stack of layers on a mesh of four devices, two parts of the batch by two stages: all layers learn at once."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import jaxfa

if __name__ == "__main__":  # four CPU devices stand in where there are no accelerators
    jax.config.update("jax_num_cpu_devices", 4)

mesh = jaxfa.stacks.mesh(data=2, layer=2)


def put(tree, axis):
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(axis)))


def block(w, h):
    return h + jnp.tanh(h @ w)


def loss_of(w, b, x, labels):
    wire = jnp.zeros((len(x), 10))  # brings the error at the logits back to every layer
    options = {"mesh": mesh, "microbatches": 4, "schedule": jaxfa.stacks.stream}
    h, wire = jaxfa.stacks.pipeline(block, w, x, wire, b, **options)
    return optax.softmax_cross_entropy_with_integer_labels(h[:, :10] + wire, labels).mean()


x, labels = jax.random.normal(jax.random.key(0), (32, 64)), jnp.arange(32) % 10
w = jax.random.normal(jax.random.key(1), (8, 64, 64)) / 64  # eight layers, four on each stage
draw = jax.vmap(lambda key: jaxfa.dfa().init(key, x, jnp.zeros((32, 10))))
b = draw(jax.random.split(jax.random.key(2), 8))

gradient = jax.jit(jax.grad(loss_of))(put(w, "layer"), put(b, "layer"), put(x, "data"), labels)
print(f"The gradient of shape {gradient.shape} lies as {gradient.sharding.spec}.")
