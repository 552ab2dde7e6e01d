"""Which of a model's tapped places are at its output already: nothing that weighs is between."""

from collections.abc import Sequence

from jax.extend.core import JaxprEqn

from jaxfa.jaxprs.cuts import Cuts, Value
from jaxfa.jaxprs.flows import CONTRACTIONS, NONE, is_pointwise

_PRODUCT = frozenset(["a product of activations"])


class Ends(Cuts):
    """As :class:`Cuts`, but whatever learns or contracts is passed, be it a norm's scale, or no parameter at all."""

    def mixed(self, values: Sequence[Value], at: tuple[object, ...]) -> Value:
        mixed = super().mixed(values, at)
        return _passed(mixed, NONE.union(*(value.names for value in values if value.is_weight)) & self.learns)

    def primitive(self, eqn: JaxprEqn, values: list[Value], at: tuple[object, ...]) -> Value:
        contracts = eqn.primitive.name in CONTRACTIONS and not is_pointwise(eqn, values)
        return _passed(super().primitive(eqn, values, at), _PRODUCT if contracts else NONE)


def _passed(value: Value, names: frozenset[str]) -> Value:
    if not names or not value.data:
        return value
    return value._replace(uses={use: since | names for use, since in value.uses.items()})
