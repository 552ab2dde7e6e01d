"""Where a model contracts activations with parameters by itself, outside of Flax's layers, and feedback for that."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxfa.base import LayerFeedback, Rule, keep
from jaxfa.jaxprs.audit import uses
from jaxfa.jaxprs.contractions import Contraction
from jaxfa.jaxprs.flows import Use
from jaxfa.jaxprs.follow import Follower
from jaxfa.jaxprs.versions import opened
from jaxfa.jaxprs.weights import Value, base, is_float
from jaxfa.nn.model.program import Example, Program, at_once
from jaxfa.nn.model.variables import Feedback, drawing, leaf_name, structs
from jaxfa.nn.weights.contraction import Contraction as OfLayer
from jaxfa.nn.weights.contraction import audited, place, sites_of
from jaxfa.nn.weights.own import OwnSite, contract, site_of, weights_of


class OwnContraction(nnx.Module):
    """The feedback of a contraction that no layer makes."""

    def __init__(self, site: OwnSite, feedback: LayerFeedback) -> None:
        self.site = nnx.static(site)
        self.path = site.name
        self.feedback = Feedback(feedback)


class Survey(NamedTuple):
    """The contractions of a model that have no feedback.

    Attributes:
      sites: where a rule can be put, with what is there.
      lost: the parameters that cannot be followed to where they are contracted.
      tables: the parameters that data looked something up in.
      stacks: for parameters that scans run over, over how many axes.
    """

    sites: dict[OwnSite, Contraction]
    lost: set[str]
    tables: set[str]
    stacks: dict[str, int]


def survey(model: nnx.Module, call: Callable[..., Any], example: Example) -> Survey:
    """Looks through a model's forward pass."""
    program = program_of(model, call, *example.arguments())
    return look_through(program, jax.make_jaxpr(program.run)(*structs(program.states)))


def look_at_layers(model: nnx.Module, call: Callable[..., Any], example: Example) -> tuple[Program, Any]:
    """A traced forward pass, as :func:`look_through` takes it, whose layers are in their scopes."""
    model = nnx.clone(model, variables=False)
    for path, (module, site) in sites_of(model).items():
        place(module, OfLayer(site, None, path))
    program = program_of(model, call, *example.arguments())
    return program, jax.make_jaxpr(program.run)(*structs(program.states))


def uses_in(program: Program, jaxpr: Any) -> dict[str, Use]:
    """The weight contractions of a forward pass, by the path of the layer that owns the weights."""
    named = zip(names_of(program), opened(jaxpr).invars, strict=True)
    found = uses(jaxpr, [name if name is None or is_float(var) else "" for name, var in named])
    # A model that is itself a layer has the empty path.
    layers = {name: f"/{name}".removesuffix("/kernel").removeprefix("/") for use in found for name in use.weights}
    return {layers[name]: use for use in found for name in sorted(use.weights)}


def names_of(program: Program) -> list[str | None]:
    """The paths of the arrays of a program that :func:`program_of` made; None for what is data."""
    params, rest, data = (jax.tree_util.tree_flatten_with_path(state)[0] for state in program.states)
    return [*[leaf_name(path) for path, _ in (*params, *rest)], *[None] * len(data)]


def look_through(program: Program, jaxpr: Any, tapped: Collection[str] = (), layers: Collection[str] = ()) -> Survey:
    """Looks through the forward pass of a program that :func:`program_of` made and that was traced already.

    Args:
      program: the program.
      jaxpr: what it was traced to.
      tapped: the parameters that are tapped, and so are activations.
      layers: the paths of layers that get feedback.
    """
    found = Survey({}, set(), set(), {})

    def see(one: Contraction, held: Any) -> None:
        site = site_of(one)
        if site is None:
            found.lost.add(one.weight.name)
        else:
            found.sites.setdefault(site, one)

    follower = Follower(see, found.lost.add, live=False, layers=layers)
    follower.run(jaxpr, _values(program.states, tapped, live=False), None)
    return found._replace(tables=follower.tables, stacks=follower.stacks)


def program_of(model: nnx.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Program:
    """A call of a model as a function of its parameters, its other state and its arguments."""
    return Program(model, call, args, kwargs, partial(_is_own, kind=nnx.Param), _is_own)


def run_with_feedback(program: Program, own: Any, left: tuple[OwnSite, ...]) -> Any:
    """Runs a model whose own contractions have feedback.

    Args:
      program: made by :func:`program_of`.
      own: the :class:`OwnContraction` of each.
      left: the contractions that are left to backpropagation.
    """
    held = {one.site: one.feedback.get_value() for one in own}

    def act(found: Contraction, held: Any) -> jax.Array | None:
        site, name = site_of(found), found.weight.name
        if site is not None and site in held:
            return contract(found, site, held[site])
        if site is None or site in left:
            return None
        raise ValueError(
            f"This call contracts {name!r} as the example did not, so that there is no feedback for it: give attach() "
            f"an example of this call, or allow={name!r}."
        )

    run = partial(program.run, prepare=audited)
    jaxpr, returned = jax.make_jaxpr(run, return_shape=True)(*structs(program.states))
    values = Follower(act, live=True).run(jaxpr, _values(program.states, live=True), held)
    return program.finish(*jax.tree.unflatten(jax.tree.structure(returned), [value.here for value in values]))


def _is_own(path: Any, value: Any, kind: type = object) -> bool:
    return path[0] == 0 and isinstance(value, kind)


def _values(states: Any, tapped: Collection[str] = (), *, live: bool) -> list[Value]:
    """What is known of a model's parameters, its other state and its arguments."""
    params, state, data = states
    values = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name, make = leaf_name(path), partial(_same, leaf)
        own = Value(leaf, make, learns=True, weight=base(name, name, leaf, make, make))
        values.append(Value(leaf, data=True) if name in tapped else own)
    values += [Value(leaf, partial(_same, leaf)) for leaf in jax.tree.leaves(state)]
    values += [Value(leaf, data=True) for leaf in jax.tree.leaves(data)]
    return values if live else [value._replace(here=None) for value in values]


def _same(leaf: Any) -> Any:
    return leaf


def put_own(rule: Rule, rngs: nnx.Rngs, sites: dict[OwnSite, Contraction]) -> tuple[list[OwnContraction], list[str]]:
    """Feedback for a model's own contractions; the parameters that the rule itself leaves to backpropagation."""
    own, backprop, draw = [], [], drawing(rule)
    for site, one in sites.items():
        w = weights_of(one, site)
        layers = w.shape[: len(site.levels) + site.view.batch]
        feedback = at_once(draw(site.name, layers), rngs.feedback(), w)
        if feedback is None:
            backprop.append(site.name)
        # A matrix alone can be masked and chosen from as the weights are; noise cannot be sent through what data chose.
        elif site.thin or (type(feedback).transport is LayerFeedback.transport and rule.refine is keep):
            own.append(OwnContraction(site, feedback))
    return own, backprop


def by_parameter(own: Any) -> dict[str, nnx.List]:
    """Contractions by the path of the parameter; several where it is contracted in several ways."""
    found: dict[str, list[OwnContraction]] = {}
    for one in own:
        found.setdefault(one.path, []).append(one)
    return {path: nnx.List(several) for path, several in found.items()}


def own_of(attached: Any) -> list[OwnContraction]:
    """An attached model's own contractions with feedback."""
    return [one for several in attached.own.values() for one in several]


def by_path(own: Any) -> dict[str, OwnContraction]:
    """Contractions by the path of the parameter, with a number where it is contracted in several ways."""
    found: dict[str, OwnContraction] = {}
    for one in own:
        count = sum(other.path == one.path for other in found.values())
        found[f"{one.path}#{count + 1}" if count else one.path] = one
    return found
