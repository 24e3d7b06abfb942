"""Which parameters layers gather, each where it passes them to `sk.nn.use_param`.

On shards `use_param` knows a weight by its logical axes alone. So weights with the same axes are
gathered by layers only together, and only if nothing else is done with any of them: a sum of
squares over one device's shard of a weight would be a part of the sum.
"""

from collections.abc import Sequence

from jax.extend import core

from ..._core.tree import Leaf
from ...nn._manual_axis_rules import Dims, Names
from .._param_uses import ParamUse, find_param_uses


def find_layer_gathers(
    loss: core.Jaxpr, params: Sequence[Leaf], storages: Sequence[Dims]
) -> tuple[dict[Names, Dims], list[Dims]]:
    """Finds the weights that layers gather, in a loss of `(params, ...)` traced on whole arrays.

    For each parameter, `storages` has the mesh axes per dim that split it in storage but not in its
    products. Returns the mesh axes per dim that layers gather, for the logical axes of a weight;
    and those that the step gathers before it calls the loss, for each parameter.
    """
    others = [None] * (len(loss.invars) - len(params))
    uses = find_param_uses(loss, [*(leaf.path for leaf in params), *others])
    stored = {leaf.path: (leaf, dims) for leaf, dims in zip(params, storages, strict=True)}
    by_step = {path for use in uses if not (use.names or use.marked) for path in use.leaves}
    marked = [use for use in uses if use.names]
    while True:
        dims: dict[Names, set[Dims | None]] = {}
        for use in marked:
            of = {_dims_of(use, *stored[p]) if p not in by_step else None for p in use.leaves}
            dims.setdefault(use.names or (), set()).update(of or {None})
        gathered = {names: each for names, (each, *rest) in dims.items() if each and not rest}
        more = {path for use in marked if use.names not in gathered for path in use.leaves}
        if more <= by_step:
            by_layers = {path for use in marked for path in use.leaves} - by_step
            rest = [
                ((),) * len(dims) if leaf.path in by_layers else dims
                for leaf, dims in zip(params, storages, strict=True)
            ]
            return {names: each for names, each in gathered.items() if any(each)}, rest
        by_step |= more


def _dims_of(use: ParamUse, leaf: Leaf, storage: Dims) -> Dims | None:
    """Mesh axes per dim that a layer gathers of a leaf, or of its slice; None if it cannot.

    A stack ("layers", "embed", "mlp") is marked as ("embed", "mlp") inside the scan over layers.
    """
    names = use.names or ()
    stacked = len(leaf.shape) - len(names)
    fits = stacked == 1 or (stacked == 0 and not use.taken)
    fits = fits and (leaf.axes or ())[stacked:] == names and not use.computed
    return storage[stacked:] if fits and not any(storage[:stacked]) else None
