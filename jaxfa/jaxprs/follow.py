"""Looks through a traced program for contractions with weights, or runs it with something else in their place."""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, jaxpr_as_fun

from jaxfa.jaxprs.contractions import CONTRACTIONS, Contraction, contraction, is_covered, scaled_and_summed, weight_of
from jaxfa.jaxprs.versions import opened, scan_parts
from jaxfa.jaxprs.weights import Value, base, is_float, over_stack
from jaxfa.ops import LOCAL

Act = Callable[[Contraction, Any], Any]


class Follower:
    """An interpreter of programs that knows which of its values are weights.

    Args:
      act: called with each contraction and with what is held; the contraction's result, or None for its own.
      lost: called with the name of weights that are multiplied with an activation and summed, without a contraction.
      live: whether to run the program; else it is looked through.
      local: the contractions, by their ids, to run in the scope of what is a layer's own.
      layers: the paths of layers, in their scopes, to be taken for such as have feedback.
    """

    def __init__(
        self,
        act: Act = lambda found, held: None,
        lost: Callable[[str], None] = lambda name: None,
        *,
        live: bool,
        local: frozenset[int] = frozenset(),
        layers: Collection[str] = (),
    ) -> None:
        self.act, self.lost, self.live, self.local, self.layers = act, lost, live, local, layers
        self.tables: set[str] = set()  # parameters that data looked something up in
        self.stacks: dict[str, int] = {}  # over how many axes of a parameter scans run
        self.products: set[int] = set()
        self.shown: set[int] = set()

    def run(self, program: Any, values: Sequence[Value], held: Any) -> list[Value]:
        """The values that a program returns.

        Args:
          program: a jaxpr, closed or open.
          values: its arguments.
          held: for each site what ``act`` needs there; in the body of a ``scan`` its entry for one layer of a stack.
        """
        jaxpr = opened(program)
        known: dict[Any, Value] = dict(zip(jaxpr.invars, values, strict=True))
        constants = map(_constant, getattr(program, "consts", ()))
        known |= dict(zip(jaxpr.constvars, constants, strict=True))

        def read(atom: Any) -> Value:
            return _constant(atom.val) if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            scope = str(eqn.source_info.name_stack)
            with jax.named_scope(scope) if scope and self.live else nullcontext():
                outs = self.equation(jaxpr, eqn, [read(var) for var in eqn.invars], held)
            known |= dict(zip(eqn.outvars, outs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def equation(self, jaxpr: Any, eqn: JaxprEqn, ins: list[Value], held: Any) -> list[Value]:
        covered = is_covered(eqn, self.layers)
        if not covered and any(value.weight is not None for value in ins):
            match eqn.primitive.name:
                case "jit" | "pjit" | "closed_call":
                    return self.run(eqn.params["jaxpr"], ins, held)
                case "remat2" | "checkpoint" | "remat":
                    options = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
                    return self.inside([eqn.params["jaxpr"]], ins, held, lambda run: jax.checkpoint(run[0], **options))
                case "cond":
                    index, *ins = ins
                    return self.inside(
                        eqn.params["branches"], ins, held, lambda runs: partial(lax.switch, index.here, runs)
                    )
                case "scan":
                    return self.scan(eqn, ins, held)
        values: list[Any] = [None] * len(eqn.outvars)
        found = None if covered else contraction(eqn, ins)
        if found is not None:
            values = [self.act(found, held)]
        elif (name := scaled_and_summed(eqn, ins)) is not None:
            self.lost(name)
        elif eqn.primitive.name == "gather" and ins[0].weight is not None and ins[1].data:
            self.tables.add(ins[0].weight.name)
        bind = _alone(jaxpr, eqn)
        if self.live and values[0] is None:
            with jax.named_scope(LOCAL) if id(eqn) in self.local else nullcontext():
                values = bind(*(value.here for value in ins))
        return self.results(eqn, ins, values, bind, covered=covered)

    def results(
        self, eqn: JaxprEqn, ins: list[Value], values: list[Any], bind: Callable[..., Any], *, covered: bool
    ) -> list[Value]:
        data, learns = any(value.data for value in ins) or covered, any(value.learns for value in ins)
        products = frozenset[int]().union(*(value.products for value in ins))
        if data and not covered and eqn.primitive.name not in (*CONTRACTIONS, "mul", "div"):
            self.shown |= products
        if not data and learns and eqn.primitive.name in CONTRACTIONS:
            self.products.add(id(eqn))
            products |= {id(eqn)}
        outs = []
        for i, (var, here) in enumerate(zip(eqn.outvars, values, strict=True)):
            full = None if data else _full(bind, [value.full for value in ins], i)
            mine = learns and is_float(var)
            outs.append(Value(here, full, data, mine, products=frozenset() if data else products))
        if len(outs) == 1 and outs[0].learns and not covered:
            outs = [outs[0]._replace(weight=weight_of(eqn, ins, outs[0], lambda *operands: bind(*operands)[0]))]
        return outs

    def inside(self, programs: Any, ins: list[Value], held: Any, wrap: Callable[[list[Any]], Any]) -> list[Value]:
        """The values that one of several programs returns, run within a transformation."""
        runs, labels = [], []
        for program in programs:
            labels.append(self.quietly(program, ins) if self.live else self.run(program, ins, held))

            def run(*arrays: Any, program: Any = program) -> list[Any]:
                known = [value._replace(here=array) for value, array in zip(ins, arrays, strict=True)]
                return [value.here for value in self.run(program, known, held)]

            runs.append(run)
        arrays = wrap(runs)(*(value.here for value in ins)) if self.live else [None] * len(labels[0])
        return [_joined(values)._replace(here=here) for here, *values in zip(arrays, *labels, strict=True)]

    def quietly(self, program: Any, ins: list[Value]) -> list[Value]:
        """What is known of the values that a program returns."""
        return Follower(live=False, layers=self.layers).run(program, [value._replace(here=None) for value in ins], None)

    def scan(self, eqn: JaxprEqn, ins: list[Value], held: Any) -> list[Value]:
        _, consts, carried = scan_parts(eqn)
        body, params = eqn.params["jaxpr"], eqn.params
        fixed, carry, over = ins[:consts], ins[consts : consts + carried], ins[consts + carried :]
        rows = [_row(value, var.aval) for value, var in zip(over, opened(body).invars[consts + carried :], strict=True)]
        carry = [_joined([value]) for value in carry]
        while True:
            outs = self.quietly(body, [*fixed, *carry, *rows])
            grown = [_joined(pair) for pair in zip(carry, outs[:carried], strict=True)]
            if [value[2:4] for value in grown] == [value[2:4] for value in carry]:
                break
            carry = grown
        self.stacks |= {row.weight.name: len(row.weight.levels) for row in rows if row.weight is not None}
        if not self.live:
            self.run(body, [*fixed, *carry, *rows], held)
            return [_joined([value]) for value in outs]
        # What is held for a stack is taken layer by layer, as the stack is.
        marks = {row.weight.levels[-1] for row in rows if row.weight is not None}
        layered = {site: one for site, one in held.items() if marks & set(site.levels)}

        def step(carries: Any, entries: Any) -> tuple[Any, Any]:
            arrays, layers = entries
            known = [value._replace(here=array) for value, array in zip(carry, carries, strict=True)]
            seen = [_entry(value, array) for value, array in zip(rows, arrays, strict=True)]
            outs = [value.here for value in self.run(body, [*fixed, *known, *seen], held | layers)]
            return outs[:carried], outs[carried:]

        options = {key: params[key] for key in ("length", "reverse", "unroll")}
        xs = [value.here for value in over], layered
        ends, ys = lax.scan(step, [value.here for value in ins[consts : consts + carried]], xs, **options)
        return [_joined([value])._replace(here=here) for value, here in zip(outs, [*ends, *ys], strict=True)]


def with_local_products(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose products of parameters with parameters are in the scope of what is a layer's own.

    The derivative of such a product, as of a spectral norm, is the weights' own: no error passes it on its way down. A
    product that is added to an activation, as a learned query that was projected is, is none of these.

    Args:
      forward: ``(params, rest, data) -> outputs``.
    """

    def run(params: Any, rest: Any, data: Any) -> Any:
        program, returned = jax.make_jaxpr(forward, return_shape=True)(params, rest, data)
        values = [
            Value(leaf, None, learns=True, weight=base("", str(i), leaf, partial(_same, leaf), None))
            for i, leaf in enumerate(jax.tree.leaves(params))
        ]
        values += [Value(leaf) for leaf in jax.tree.leaves(rest)]
        values += [Value(leaf, data=True) for leaf in jax.tree.leaves(data)]
        seen = Follower(live=False)
        seen.run(program, values, None)
        local = frozenset(seen.products - seen.shown)
        outs = Follower(live=True, local=local).run(program, values, {})
        return jax.tree.unflatten(jax.tree.structure(returned), [out.here for out in outs])

    return run


def _same(value: Any) -> Any:
    return value


def _full(bind: Callable[..., Any], makes: list[Any], at: int) -> Callable[[], Any] | None:
    """What makes one result of an equation, if there is what makes its operands."""
    return None if None in makes else lambda: bind(*(make() for make in makes))[at]


def _constant(value: Any) -> Value:
    return Value(value, partial(_same, value))


def _joined(values: Sequence[Value]) -> Value:
    """What is known of a value that may be one of several, as an activation."""
    learns = any(value.learns for value in values)
    return Value(values[0].here, None, learns or any(value.data for value in values), learns)


def _row(value: Value, aval: Any) -> Value:
    """What is known of one entry of what a ``scan`` runs over."""
    weight = value.weight
    if weight is None or value.data:
        return value._replace(full=None, weight=None)
    levels = (*weight.levels, f"{weight.mark}/")
    makes: list[Any] = [constant.full for constant in weight.constants]

    def root() -> jax.Array:
        def run(w: jax.Array) -> jax.Array:
            return weight.valued(w, *(make() for make in makes))

        return over_stack(run, weight.levels)(weight.stacked())

    made = None if None in (weight.root, weight.tail, *makes) else root
    inside = base(weight.name, levels[-1], aval, lambda: None, made)
    return Value(learns=True, weight=inside._replace(dtype=weight.dtype, levels=levels))


def _entry(row: Value, array: Any) -> Value:
    if row.weight is None:
        return row._replace(here=array)
    return row._replace(here=array, weight=row.weight._replace(here=lambda: array))


def _alone(jaxpr: Any, eqn: JaxprEqn) -> Callable[..., list[Any]]:
    """One equation as a function of its operands."""

    def bind(*values: Any) -> list[Any]:
        given = {var: value for var, value in zip(eqn.invars, values, strict=True) if not isinstance(var, Literal)}
        program = jaxpr.replace(constvars=[], invars=list(given), outvars=list(eqn.outvars), eqns=[eqn])
        return jaxpr_as_fun(ClosedJaxpr(program, []))(*given.values())

    return bind
