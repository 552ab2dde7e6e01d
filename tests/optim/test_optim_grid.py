"""The grid: every rule, every optax wrapper, inside and outside of ``jaxfa.optimizer``, against theory or refused."""

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import jaxfa
from tests.methods import create

KEY = jax.random.PRNGKey(0)
SIZES = (3, 3, 3)  # widths repeat, so that a shape alone does not tell whose weights a feedback stands for
FROZEN = 1
DECAY, RATE, STEPS, NAN, ZERO = 0.1, 0.2, 6, 3, 5  # one batch is of NaN, one teaches nothing
# The fixed ones are as fa or dfa; weight_mirror, normative_ldfa, grape and fdfa, which learn by refine and by plain
# steps, as dkp.
RULES = {
    "backprop": jaxfa.backprop(),
    "fa": jaxfa.fa(),
    "brsf": jaxfa.brsf(),
    "dkp": jaxfa.dkp(learning_rate=0.1),
    "kolen_pollack": jaxfa.kolen_pollack(weight_decay=DECAY),
    "ldfa": jaxfa.ldfa(2, weight_decay=DECAY, learning_rate=RATE),
    "ldfa_q": jaxfa.ldfa(2, learn_p=False, weight_decay=DECAY),
    "ldfa_p": jaxfa.ldfa(2, learn_q=False, learning_rate=RATE),
    "dldfa": jaxfa.dldfa(2, weight_decay=DECAY, learning_rate=RATE),
    "dldfa_q": jaxfa.dldfa(2, learn_p=False, weight_decay=DECAY),
    "ssa": jaxfa.ssa(parallel=False, beta=0.0),
    "ssa_transported": jaxfa.ssa(parallel=False, beta=0.05, pull_weights=False, pull_feedback=True, retract=False),
}
JOINT = [name for name, rule in RULES.items() if not isinstance(rule.transform, optax.GradientTransformation | None)]
LEARNS_ITSELF = "brsf", "dkp", "ldfa", "ldfa_p", "dldfa"


class Wrapper(NamedTuple):
    """A row: ``wrap(tx)`` for a tree, around ``base``; what it does to a batch of NaN; and when it steps."""

    wrap: Any
    base: Any = optax.sgd(0.1, momentum=0.5)
    steps: Any = lambda t: True
    searches: bool = False
    nan: bool = False


def by_name(tree):
    """True of weights, and of what learns as they do."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "'b'" not in jax.tree_util.keystr(path), tree)


def by_shape(tree):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def labels(tree):
    """One layer is frozen."""

    def label(path, leaf):
        del leaf
        layers = [key.idx for key in path if isinstance(key, jax.tree_util.SequenceKey)]
        return "frozen" if layers[-1] == FROZEN else "learns"

    return jax.tree_util.tree_map_with_path(label, tree)


def decayed(mask):
    return lambda tx: optax.chain(tx, optax.add_decayed_weights(-0.01, mask=mask))


def partition(tx, tree, labels):
    return optax.partition({"learns": tx, "frozen": optax.set_to_zero()}, labels)


def injected(tx):
    return optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(rate=0.5)


descent, SEARCH = optax.identity(), optax.scale_by_backtracking_linesearch(4)
WRAPPERS = {
    "chain with clip, masked, injected rate": Wrapper(
        lambda tx, _: optax.chain(
            optax.clip_by_global_norm(0.5), optax.masked(injected(tx), lambda tree: jax.tree.map(lambda _: True, tree))
        )
    ),
    "MultiSteps": Wrapper(lambda tx, _: optax.MultiSteps(tx, 3), steps=lambda t: t % 3 == 2),
    "apply_if_finite": Wrapper(lambda tx, _: optax.apply_if_finite(tx, 9), steps=lambda t: t != NAN, nan=True),
    "partition by name": Wrapper(lambda tx, tree: partition(tx, tree, labels)),
    "partition by tree": Wrapper(lambda tx, tree: partition(tx, tree, labels(tree))),
    "set_to_zero": Wrapper(lambda tx, _: optax.chain(tx, optax.set_to_zero()), steps=lambda t: False),
    "masks by name and shape": Wrapper(lambda tx, tree: decayed(by_name)(decayed(by_shape)(tx))),
    "masks by tree": Wrapper(lambda tx, tree: decayed(by_name(tree))(decayed(by_shape(tree))(tx))),
    "lookahead": Wrapper(lambda tx, _: optax.lookahead(tx, 2, 0.5)),
    "schedule_free": Wrapper(lambda tx, _: optax.contrib.schedule_free(tx, 0.1)),
    "muon": Wrapper(lambda tx, _: optax.chain(tx, optax.contrib.muon(0.1, ns_steps=1)), descent),
    "lbfgs": Wrapper(
        lambda tx, _: optax.chain(tx, optax.lbfgs(memory_size=1, linesearch=SEARCH)), descent, searches=True
    ),
    "line search": Wrapper(lambda tx, _: optax.chain(tx, SEARCH), optax.sgd(4.0), searches=True),
}
UNDONE = "lookahead", "schedule_free", "lbfgs", "line search"


def is_refused(rule, wrapper, inside):
    """Which cells are refused: what would undo a rule's own step, or take batches from a feedback that learns."""
    if not inside:
        return False
    return (
        (rule in JOINT and wrapper in UNDONE)
        or (rule in LEARNS_ITSELF and wrapper == "MultiSteps")
        or (rule in ("dldfa", "dldfa_q") and "by tree" in wrapper)
    )


def value(params):
    return sum(jnp.sum((leaf - 0.3) ** 2) for leaf in jax.tree.leaves(params)) / 4


def lesson(params, feedback, t, wrapper):
    """Gradients and signals of a batch."""
    factor = jnp.where((t == ZERO) & (not wrapper.searches), 0.0, jnp.where((t == NAN) & wrapper.nan, jnp.nan, 1.0))
    grads = jax.tree.map(lambda leaf: factor * (leaf - 0.3) / 2, params)

    def teach(i, node):
        if isinstance(node, jaxfa.kolen_pollack().init(KEY, jnp.ones((1, 1))).__class__):
            return replace(node, b=grads[i]["w"])
        return jax.tree.map(lambda leaf: factor * jnp.sin(leaf + t), node)

    return grads, [None if node is None else teach(i, node) for i, node in enumerate(feedback or [])]


def train(tx, tree, view, wrapper):
    """The tree at the end of a run."""

    def step(carry, t):
        tree, state = carry
        params, feedback = view(tree)
        grads = lesson(params, feedback, t, wrapper)
        grads = grads if feedback is not None else grads[0]
        extra = {"value": value(params), "grad": grads, "value_fn": lambda tree: value(view(tree)[0])}
        updates, state = tx.update(grads, state, tree, **(extra if wrapper.searches else {}))
        return (optax.apply_updates(tree, updates), state), None

    return jax.lax.scan(step, (tree, tx.init(tree)), jnp.arange(STEPS))[0][0]


def trees(rule, inside, wrapper):
    """The tree that a user passes to ``update``, how to see the pair in it, and the tree for masks."""
    both = create(rule, KEY, (4, *SIZES) if "partition" in wrapper else SIZES, jnp.float64)
    if wrapper != "lookahead":
        return both, lambda tree: tree, both[0] if inside else both
    pack = optax.LookaheadParams.init_synced
    if inside:
        return (pack(both[0]), both[1]), lambda tree: (tree[0].fast, tree[1]), both[0]
    return pack(both), lambda tree: tree.fast, both


FIELDS = {"kolen_pollack": "b", "ldfa": "q", "ldfa_q": "q", "dldfa": "q", "dldfa_q": "q", "ssa_transported": "b"}
ON_STIEFEL = [
    optax.masked(jaxfa.factored.stiefel(retract=way), jaxfa.factored.orthonormal_factors) for way in (False, True)
]


def has(node):
    return bool(jax.tree.leaves(node))


def masked(tree):
    return jax.tree.map(lambda _: optax.MaskedNode(), tree)


def shown(name, params, feedback):
    """What of the feedback the user's optimizer learns, where it sees it: in the places of the weights."""
    nodes = [getattr(node, FIELDS[name]) if has(node) else None for node in feedback]
    if name.startswith("dldfa"):
        return nodes
    if name == "ssa_transported":
        return [masked(p) if b is None else {"b": masked(p["b"]), "w": b} for p, b in zip(params, nodes, strict=True)]
    return [p if q is None else p | {"w": q} for p, q in zip(params, nodes, strict=True)]


def theory(name, tx, steps=lambda t: True, frozen=None, searches=False):
    """The rule with an optimizer, on layers in a list, by the book: weights, then feedback, and decay in its steps."""
    tx = optax.with_extra_args_support(tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx)
    own = RULES[name].transform if name in ("brsf", "dkp", "ldfa_p") else None
    is_ssa, decay = name.startswith("ssa"), 0.0 if name.startswith("ssa") else DECAY
    rate = RATE if name in ("ldfa", "dldfa") else 0.0

    def init(both):
        twins = tx.init(shown(name, *both)) if name in FIELDS else ()
        return (
            jnp.zeros((), int),
            tx.init(both[0]),
            twins,
            own.init([node if has(node) else None for node in both[1]]) if own else (),
        )

    def update(updates, state, params, **extra):
        (t, weights, twins, others), (g, s), (params, feedback) = state, updates, params
        if extra:
            both = extra["value_fn"]
            extra |= {"grad": extra["grad"][0], "value_fn": lambda params: both((params, feedback))}
        now = [jnp.asarray(steps(t)) & (i != frozen) for i in range(len(params))]
        if is_ssa:
            g, _ = ON_STIEFEL[0].update(g, ON_STIEFEL[0].init(params), params)
        u, weights = tx.update(g, weights, params, **extra)
        if name == "ssa":
            back, _ = ON_STIEFEL[1].update(u, ON_STIEFEL[1].init(params), params)
            u = [jax.tree.map(lambda a, b, n=n: jnp.where(n, a, b), x, y) for x, y, n in zip(back, u, now, strict=True)]
        if name in FIELDS and not is_ssa:
            u = [
                {"w": jax.tree.map(lambda a, w, n=n: a - n * decay * w, one["w"], p["w"]), "b": one["b"]}
                for one, p, n in zip(u, params, now, strict=True)
            ]
        learned = jax.tree.map(jnp.zeros_like, s)
        if own:  # learns in the steps on the weights
            found = sum(jnp.sum(leaf != 0) for leaf in jax.tree.leaves(u)) > 0
            moves = steps(t) & (found if searches else True)  # a search may find no step
            present = [[node if has(node) else None for node in nodes] for nodes in (s, feedback)]
            steps_of, kept = own.update(present[0], others, present[1])
            steps_of = jax.tree.unflatten(jax.tree.structure(s), jax.tree.leaves(steps_of))
            learned = jax.tree.map(lambda a: jnp.where(moves, a, 0), steps_of)
            others = jax.tree.map(lambda new, old: jnp.where(moves, new, old), kept, others)
        if name in FIELDS:
            signals = shown(name, g, s)
            if name == "ssa_transported":
                signals = shown(
                    name,
                    g,
                    [
                        n and replace(n, b=jax.tree.map(lambda b, w: 0.1 * (b - w), n.b, p["w"])) if has(n) else n
                        for n, p in zip(feedback, params, strict=True)
                    ],
                )
            v, twins = tx.update(signals, twins, shown(name, params, feedback), **extra)
            for i, node in enumerate(feedback):
                if has(node):
                    step = v[i] if name.startswith("dldfa") else v[i]["w"]
                    q = getattr(node, FIELDS[name])
                    step = jax.tree.map(lambda a, b, n=now[i]: a - n * decay * b, step, q)
                    rest = jax.tree.map(lambda a, n=now[i]: jnp.where(n, -rate * a, 0), s[i])
                    learned[i] = replace(rest, **{FIELDS[name]: step})
        return (u, learned), (t + 1, weights, twins, others)

    return optax.GradientTransformationExtraArgs(init, update)


def is_another(rule, wrapper, inside):
    """Which cells are of the kind of another one, of this rule or of its like."""
    if rule == "ssa":  # ssa_transported has no retraction: each takes long to compile
        return not inside or wrapper not in ("MultiSteps", "partition by name")
    return rule in ("ldfa_q", "dldfa_q", "ldfa_p") and (wrapper != "MultiSteps" or not inside)


def cell(rule, wrapper, inside):
    """The tree of a rule, its run and the expected one, each a function of that tree."""
    row = WRAPPERS[wrapper]
    tree, view, masks = trees(RULES[rule], inside, wrapper)
    tx = row.wrap(row.base, masks) if inside else row.base
    ours = jaxfa.optimizer(tx, RULES[rule])
    if is_refused(rule, wrapper, inside):
        with pytest.raises(ValueError, match=r"put it outside|in the place of trees"):
            ours.init(tree)
        return None

    def run(tree):
        return view(train(ours if inside else row.wrap(ours, masks), tree, view, row))

    def plain(tree):  # optax on the parameters alone
        params, feedback = view(tree)
        alone = optax.LookaheadParams.init_synced(params) if wrapper == "lookahead" else params
        last = train(row.wrap(row.base, params), alone, lambda tree: (getattr(tree, "fast", tree), None), row)
        return getattr(last, "fast", last), feedback

    def book(tree):
        frozen = FROZEN if "partition" in wrapper else None
        tx_by_book = (
            theory(rule, tx, row.steps, frozen, row.searches) if inside else row.wrap(theory(rule, row.base), masks)
        )
        return view(train(tx_by_book, tree, view, row))

    return tree, run, plain if rule == "backprop" or (rule == "fa" and inside) else book


FAMILIES = {
    "dense": ("backprop", "dkp", "kolen_pollack", "ldfa", "ldfa_q", "ldfa_p", "dldfa_q"),
    "alike": ("fa", "brsf", "dldfa"),  # go by the same paths as others above
    "factors": ("ssa", "ssa_transported"),
}


def cells():
    """Long are those that differ from others in what takes no part, and those that take long to compile."""
    for wrapper, family, inside in itertools.product(WRAPPERS, FAMILIES, (True, False)):
        again = not inside and (family == "alike" or "by tree" in wrapper)
        slow = wrapper in ("muon", "lbfgs", "chain with clip, masked, injected rate")
        long = again or (slow and (family == "alike" or not inside))
        long = long or (family == "factors" and wrapper != "partition by name")
        marks = pytest.mark.long if long else ()
        yield pytest.param(
            wrapper, family, inside, marks=marks, id=f"{wrapper}-{family}-{'inside' if inside else 'outside'}"
        )


@pytest.mark.parametrize(("wrapper", "family", "inside"), list(cells()))
def test_every_rule_is_lawful_under_every_wrapper_or_refuses_it(wrapper, family, inside, x64):
    rules = [rule for rule in FAMILIES[family] if not is_another(rule, wrapper, inside)]
    made = {rule: found for rule in rules if (found := cell(rule, wrapper, inside))}

    @jax.jit  # one program for all rules: what they have in common is compiled once
    def ends(given):
        return {rule: (made[rule][1](tree), made[rule][2](tree)) for rule, tree in given.items()}

    for rule, (last, expected) in ends({rule: tree for rule, (tree, *_) in made.items()}).items():
        exact = rule == "backprop" or (rule == "fa" and inside)
        tolerance = 0.0 if exact else 1e-6 if wrapper == "muon" else 1e-9
        chex.assert_trees_all_close(last, expected, rtol=tolerance, atol=0.0 if exact else 1e-12, custom_message=rule)
