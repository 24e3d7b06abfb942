"""Says the layout of a constraint by logical axes, as `sk.nn.constrain` takes it.

With activations `{"batch": "data", "mlp": "tensor"}`, of an array that is to be split by columns:

    sk.nn.constrain(h, "batch", "embed")    a name of another dim: "mlp" in its place
    sk.nn.constrain(h, "batch", "mlp")      with "mlp" mapped to nothing: the map is at fault, where
                                            the columns of a weight are "mlp" as well
"""

import dataclasses
from collections.abc import Collection, Sequence

from ..nn._constrain import GRADIENT_SHARDS, MAPPED
from ..report import OddDeclaration
from ..rules import AxisRules
from ._disagreements import Axes


def name_layout(
    odd: OddDeclaration,
    names: Sequence[str | None],
    dims: Sequence[Axes | None],
    of_params: Sequence[Collection[str]],
    rules: AxisRules | None,
) -> OddDeclaration:
    """Returns a constraint's declaration with logical axes for its layout, where there are some.

    Args:
      odd: the declaration.
      names: logical axes that the constraint has.
      dims: mesh axes that they say.
      of_params: for each dim, what parameters call the dims that it comes from.
      rules: of activations.
    """
    if rules is None or not names or {GRADIENT_SHARDS, MAPPED} & {*names}:
        return odd
    changed: list[str | None] = []
    mapped: dict[str, Axes] = {}
    columns = zip(names, dims, odd.layout, of_params, strict=True)
    for name, axes, wanted, others in columns:
        if axes == wanted or wanted is None:
            changed.append(name)
        elif name in others:
            changed.append(name)
            mapped[str(name)] = wanted
        else:
            known = [*sorted(others), *(one for one, _ in rules.table)]
            fit = [one for one in known if _maps(rules, one) == wanted]
            if wanted and not fit:
                return odd
            changed.append(fit[0] if wanted else None)
    renamed = tuple(changed) if tuple(changed) != tuple(names) else ()
    return dataclasses.replace(odd, names=renamed, mapped=tuple(mapped.items()))


def _maps(rules: AxisRules, name: str) -> Axes:
    return rules.mesh_axes(name) if name in dict(rules.table) else ()
