"""Says the layout of a constraint as the model writes it: by logical axes, of all rows.

With activations `{"batch": "data", "mlp": "tensor"}`, of an array that is to be split by columns:

    sk.nn.constrain(h, "batch", "embed")    a name of another dim: "mlp" in its place
    sk.nn.constrain(h, "batch", "mlp")      with "mlp" mapped to nothing: the map is at fault, where
                                            the columns of a weight are "mlp" as well

Where gradient shards divide the rows, f32[2, 16, 64] at P("data", None, "tensor") in the step is
f32[32, 64] at P("data", "tensor") in the model.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence

from ..nn._constrain import MAPPED
from ..report import OddDeclaration
from ..rules import AxisRules
from ._activations import Activations
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
    if rules is None or not names or MAPPED in names:
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


def find_shards(
    dims: Sequence[Axes | None], shape: Sequence[int], activations: Activations
) -> int | None:
    """The dim of a constraint over gradient shards; None of one that these do not divide."""
    axes = activations.shard_axes
    number = math.prod(activations.mesh.shape[axis] for axis in axes)
    columns = enumerate(zip(dims, shape, strict=True))
    found = (dim for dim, column in columns if axes and column == (axes, number))
    return next(found, None) if len(shape) > 1 else None


def without_shards(odd: OddDeclaration, shards: int | None) -> OddDeclaration:
    """A constraint's declaration without the dim over gradient shards: their rows are dim 0."""
    if shards is None:
        return odd
    names, shape, layout = [*odd.names], [*odd.shape], [*odd.layout]
    del names[shards : shards + 1]
    number, axes = shape.pop(shards), layout.pop(shards) or ()
    shape[0] *= number
    layout[0] = layout[0] if layout[0] is None else (*axes, *layout[0])
    return dataclasses.replace(odd, names=tuple(names), shape=tuple(shape), layout=tuple(layout))


def _maps(rules: AxisRules, name: str) -> Axes:
    return rules.mesh_axes(name) if name in dict(rules.table) else ()
