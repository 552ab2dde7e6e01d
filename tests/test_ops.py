"""The two primitives: what any bilinear operation and any error wire must do."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxfa

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape))


def conv(x_shape, w_shape, **settings):
    return lambda x, w, feedback=None: jaxfa.conv(x, w, feedback, **settings), x_shape, w_shape


def einsum(spec, x_shape, w_shape):
    return jaxfa.with_feedback(lambda x, w: jnp.einsum(spec, x, w)), x_shape, w_shape


OPERATIONS = {
    "linear": (jaxfa.linear, (5, 4), (4, 3)),
    "linear_one_example": (jaxfa.linear, (4,), (4, 3)),
    "linear_tokens": (jaxfa.linear, (2, 5, 4), (4, 3)),
    "einsum_heads": einsum("nhi,hij->nhj", (4, 2, 3), (2, 3, 5)),
    "einsum_two_axes": einsum("nij,ijkl->nkl", (4, 2, 3), (2, 3, 2, 5)),
    "conv1d_valid": conv((2, 9, 3), (4, 3, 2), padding="VALID"),
    "conv2d_same": conv((2, 5, 6, 3), (3, 3, 3, 4)),
    "conv2d_strided": conv((2, 7, 6, 3), (3, 3, 3, 4), strides=(2, 3)),
    "conv2d_dilated": conv((2, 7, 6, 3), (3, 2, 3, 4), dilation=(2, 1), padding="VALID"),
    "conv2d_padded": conv((2, 5, 6, 3), (3, 3, 3, 4), padding=[(2, 0), (1, 3)], strides=2),
    "conv2d_grouped": conv((2, 5, 6, 4), (3, 3, 2, 6), groups=2, strides=2),
    "conv2d_depthwise": conv((2, 5, 6, 3), (3, 3, 1, 6), groups=3),
    "conv3d": conv((1, 4, 3, 5, 2), (2, 2, 3, 2, 3), strides=(1, 2, 1)),
}
every_operation = pytest.mark.parametrize(("op", "x_shape", "w_shape"), OPERATIONS.values(), ids=OPERATIONS)


@every_operation
def test_weights_as_feedback_are_backpropagation(op, x_shape, w_shape, x64):
    x, w = normal(*x_shape), normal(*w_shape)
    delta = normal(*jax.eval_shape(op, x, w).shape)

    @jax.jit
    def both(x, w):
        y, true = jax.vjp(op, x, w)
        z, pseudo = jax.vjp(lambda x, w: op(x, w, jaxfa.FixedFeedback(w)), x, w)
        return (y, true(delta)), (z, pseudo(delta))

    true, pseudo = both(x, w)
    chex.assert_trees_all_close(pseudo, true, atol=1e-12, rtol=1e-12)


@every_operation
def test_the_error_returns_through_the_transpose_of_the_feedback(op, x_shape, w_shape, x64):
    # <op(u, b), delta> = <u, dx> for every u defines the transpose without computing one.
    x, w, b, u = normal(*x_shape), normal(*w_shape), normal(*w_shape), normal(*x_shape)
    delta = normal(*jax.eval_shape(op, x, w).shape)

    @jax.jit
    def sides(x, w, b):
        _, pseudo = jax.vjp(op, x, w, jaxfa.FixedFeedback(b))
        dx, dw, signal = pseudo(delta)
        return (
            jnp.vdot(op(u, b), delta),
            jnp.vdot(u, dx),
            jnp.vdot(op(u, w), delta),
            jnp.vdot(op(x, b), delta),
            jnp.vdot(b, dw),
            signal.b,
        )

    through_b, received, through_w, moved, expected, signal = sides(x, w, b)
    np.testing.assert_allclose(received, through_b, atol=1e-12, rtol=1e-12)
    assert abs(received - through_w) > 1e-3
    np.testing.assert_allclose(expected, moved, atol=1e-12, rtol=1e-12)
    assert not np.any(signal)


@pytest.mark.parametrize("name", ["linear_tokens", "conv2d_padded"])
def test_bfloat16_is_near_and_stays_bfloat16(name):
    op, x_shape, w_shape = OPERATIONS[name]
    x, w, b = normal(*x_shape), normal(*w_shape), normal(*w_shape)
    narrow = [leaf.astype(jnp.bfloat16) for leaf in (x, w, b)]

    def changes(x, w, b):
        return jax.grad(lambda x, w: jnp.sum(op(x, w, jaxfa.FixedFeedback(b)).astype(jnp.float32) ** 2), (0, 1))(x, w)

    for rough, exact in zip(jax.jit(changes)(*narrow), jax.jit(changes)(x, w, b), strict=True):
        assert rough.dtype == jnp.bfloat16
        assert jnp.linalg.norm((rough - exact).ravel()) < 0.02 * jnp.linalg.norm(exact.ravel())


def test_linear_and_conv_are_the_formulas(x64):
    x, w, b, delta = (np.asarray(normal(*s)) for s in ((5, 4), (4, 3), (4, 3), (5, 3)))
    y, pseudo = jax.vjp(jaxfa.linear, x, w, jaxfa.FixedFeedback(jnp.asarray(b)))
    dx, dw, _ = pseudo(delta)
    np.testing.assert_allclose(y, x @ w, atol=1e-14)
    np.testing.assert_allclose(dx, delta @ b.T, atol=1e-14)
    np.testing.assert_allclose(dw, x.T @ delta, atol=1e-14)
    # A VALID convolution in one dimension, written out.
    x, w, b, delta = (np.asarray(normal(*s)) for s in ((2, 6, 3), (2, 3, 4), (2, 3, 4), (2, 5, 4)))
    y, pseudo = jax.vjp(lambda *args: jaxfa.conv(*args, padding="VALID"), x, w, jaxfa.FixedFeedback(jnp.asarray(b)))
    dx, dw, _ = pseudo(delta)
    by_hand_dx, by_hand_dw = np.zeros_like(x), np.zeros_like(w)
    for position in range(5):
        for tap in range(2):
            by_hand_dx[:, position + tap] += delta[:, position] @ b[tap].T
            by_hand_dw[tap] += x[:, position + tap].T @ delta[:, position]
    np.testing.assert_allclose(y, sum(x[:, t : t + 5] @ w[t] for t in range(2)), atol=1e-13)
    np.testing.assert_allclose(dx, by_hand_dx, atol=1e-13)
    np.testing.assert_allclose(dw, by_hand_dw, atol=1e-13)


def test_no_feedback_is_the_plain_operation_in_forward_mode_too(x64):
    x, w, v = normal(5, 4), normal(4, 3), normal(5, 4)
    np.testing.assert_allclose(jax.jvp(lambda x: jaxfa.linear(x, w), (x,), (v,))[1], v @ w, atol=1e-14)
    h, wire = jaxfa.direct(x, jaxfa.error_wire(x), None)
    assert h is x
    assert not np.any(wire)
    plain = jax.make_jaxpr(lambda x: jaxfa.direct(x, wire, None)[0] @ w)(x)
    assert str(plain) == str(jax.make_jaxpr(lambda x: x @ w)(x))


def test_forward_mode_through_a_feedback_is_refused():
    x, w = jnp.ones((5, 4)), jnp.ones((4, 3))
    with pytest.raises(TypeError, match=r"no forward mode .* jaxfa\.nn\.plain\(model\)"):
        jax.jvp(lambda x: jaxfa.linear(x, w, jaxfa.FixedFeedback(w)), (x,), (x,))
    feedback = jaxfa.DirectMatrix(jnp.ones((4, 3)))
    with pytest.raises(TypeError, match=r"no forward mode .* jaxfa\.nn\.plain\(model\)"):
        jax.jvp(lambda x: jaxfa.direct(x, jnp.zeros((5, 3)), feedback)[1], (x,), (x,))


def test_cotangents_sum_over_the_uses_of_one_feedback(x64):
    w, x1, x2 = normal(4, 4), normal(5, 4), normal(3, 4)
    feedback = jaxfa.kolen_pollack().init(jax.random.key(0), w)

    def loss(b, *inputs):
        return sum(jnp.sum(jnp.sin(jaxfa.linear(x, w, b))) for x in inputs)

    one, two, both = (jax.grad(loss)(feedback, *inputs).b for inputs in ((x1,), (x2,), (x1, x2)))
    assert np.linalg.norm(one) > 0.1
    np.testing.assert_allclose(both, one + two, atol=1e-13)
    matrix, e = jaxfa.dkp().init(jax.random.key(0), x1, x1), normal(5, 4)

    def direct_loss(b, times):
        h, wire = x1, jaxfa.error_wire(x1)
        for _ in range(times):
            h, wire = jaxfa.direct(h, wire, b)
        return jnp.vdot(h + wire, e)

    np.testing.assert_allclose(jax.grad(direct_loss)(matrix, 1).b, x1.T @ e, atol=1e-13)
    np.testing.assert_allclose(jax.grad(direct_loss)(matrix, 3).b, 3 * x1.T @ e, atol=1e-13)


def test_the_wire_hands_the_error_on_unchanged_and_blocks_the_layers_above(x64):
    h, b, e, w = normal(5, 4), normal(4, 3), normal(5, 3), normal(4, 3)

    def output(h, wire):
        h, wire = jaxfa.direct(h, wire, jaxfa.DirectMatrix(b))
        return h @ w + wire

    (value, pseudo) = jax.vjp(output, h, jnp.zeros((5, 3)))
    np.testing.assert_array_equal(value, h @ w)
    dh, received = pseudo(e)
    np.testing.assert_array_equal(received, e)
    np.testing.assert_allclose(dh, e @ b.T, atol=1e-14)


def refused(error, function, *parts):
    with pytest.raises(error) as caught:
        function()
    for part in parts:
        assert re.search(re.escape(part), str(caught.value)), str(caught.value)


def test_wrong_families_and_shapes_say_what_to_do():
    x, w = jnp.ones((5, 4)), jnp.ones((4, 3))
    matrix, fixed = jaxfa.DirectMatrix(jnp.ones((4, 3))), jaxfa.FixedFeedback(w)
    wire = jnp.zeros((5, 3))
    refused(TypeError, lambda: jaxfa.linear(x, w, matrix), "LayerFeedback", "DirectMatrix", "jaxfa.direct(")
    refused(TypeError, lambda: jaxfa.linear(x, w, w), "FixedFeedback(b)")
    refused(TypeError, lambda: jaxfa.direct(x, wire, fixed), "DirectFeedback", "jaxfa.linear(")
    refused(TypeError, lambda: jaxfa.direct(x, wire, jnp.ones((4, 3))), "DirectMatrix(b)")
    refused(ValueError, lambda: jaxfa.linear(x, w.T), "(5, 4)", "(3, 4)")
    refused(ValueError, lambda: jaxfa.linear(x, jnp.ones((2, 4, 3))), "(n, m)")
    refused(ValueError, lambda: jaxfa.conv(jnp.ones((2, 5, 5, 4)), jnp.ones((3, 3, 3, 6))), "groups=1")
    refused(ValueError, lambda: jaxfa.conv(jnp.ones((2, 5, 5, 4)), jnp.ones((3, 3, 2, 5)), groups=2), "groups=2")
    refused(ValueError, lambda: jaxfa.conv(x, w), "1 to 3 spatial")


@pytest.mark.parametrize("shape", [(3, 4), (4, 5), (4, 1), (4,), ()])
def test_a_feedback_of_another_shape_is_refused(shape):
    x, w = jnp.ones((5, 4)), jnp.ones((4, 3))
    backward = jax.grad(lambda x: jaxfa.linear(x, w, jaxfa.FixedFeedback(jnp.ones(shape))).sum())
    refused(ValueError, lambda: backward(x), f"{shape}", "(4, 3)", "rule.init(key, w)")


def test_a_kernel_of_another_window_is_refused_although_it_would_fit():
    x, w, b = jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 4)), jnp.ones((1, 1, 3, 4))
    backward = jax.grad(lambda x: jaxfa.conv(x, w, jaxfa.FixedFeedback(b)).sum())
    refused(ValueError, lambda: backward(x), "(1, 1, 3, 4)", "(3, 3, 3, 4)")


def test_direct_feedback_of_another_layer_is_refused():
    h = jnp.ones((5, 4))

    def backward(h, b):
        return jax.grad(lambda h: jaxfa.direct(h, jnp.zeros((5, 3)), jaxfa.DirectMatrix(b))[1].sum())(h)

    for shape in ((3, 4), (5, 3), (4, 2), (4,), (2, 4, 3)):
        refused(ValueError, lambda shape=shape: backward(h, jnp.ones(shape)), f"{shape}", "rule.init(key, h, logits)")
    with pytest.raises(ValueError, match="batch axis first"):
        jaxfa.dfa().init(jax.random.key(0), jnp.ones((4, 5)), jnp.ones((5, 3)))


class Broken(jaxfa.LayerFeedback):
    pass


jax.tree_util.register_dataclass(Broken, [], [])


@jax.tree_util.register_static
class Crooked(jaxfa.DirectFeedback):
    def deliver(self, h, e):
        return e


def test_a_rule_of_ones_own_is_told_what_it_lacks():
    x, w = jnp.ones((5, 4)), jnp.ones((4, 3))
    with pytest.raises(NotImplementedError, match=r"Broken must define matrix\(w\)"):
        jax.grad(lambda x: jaxfa.linear(x, w, Broken()).sum())(x)
    with pytest.raises(NotImplementedError, match=r"must define deliver\(h, e\)"):
        jaxfa.DirectFeedback().deliver(x, x)
    with pytest.raises(ValueError, match=r"Crooked must return errors .* expected \(5, 4\), got \(5, 3\)"):
        jax.grad(lambda h: jaxfa.direct(h, jnp.zeros((5, 3)), Crooked())[1].sum())(x)


@pytest.mark.parametrize(("init", "count"), [(lambda key: None, 1), (jaxfa.ldfa(2).init, 2), (jaxfa.dfa().init, 3)])
def test_a_rule_is_of_the_family_whose_arguments_its_init_takes(init, count):
    families = [(jaxfa.Rule, 0, ""), (jaxfa.LayerRule, 2, "key, w"), (jaxfa.DirectRule, 3, "key, h, logits")]
    for family, takes, names in families:
        if count == takes:
            assert family(init).init is init
        else:
            message = rf"{family.__name__}\(init\) expects init\({names}\), got .* Make a LayerRule"
            with pytest.raises(TypeError, match=message):
                family(init)


def test_conv_agrees_with_the_library_on_channels_last(x64):
    x, w = normal(2, 5, 6, 3), normal(3, 3, 3, 4)
    expected = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_array_equal(jaxfa.conv(x, w), expected)
