"""Scalars of the train state as columns of the metrics: a learning rate, a loss scale, a count."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._core.errors import ConfigError, Problem, did_you_mean, raise_all
from .._core.tree import leaves_by_path
from ..rules import matches

_HEADLINE = "Scalars of the state cannot be metrics."


def find_state_metrics(declared: Mapping[str, str], state: Any) -> dict[str, str]:
    """Returns `{name: path}` of the scalars that globs name.

    Raises ConfigError with each glob that matches no scalar of the abstract state, or several.
    """
    leaves = leaves_by_path(state).items()
    scalars = [
        path
        for path, x in leaves
        if x.shape == () and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    found = {
        name: [path for path in scalars if matches(glob, path)] for name, glob in declared.items()
    }
    problems = [
        Problem(
            f"metrics[{name!r}]",
            f"{declared[name]!r} matches {', '.join(paths) or 'no scalar of the state'}."
            + did_you_mean(declared[name], scalars),
            f"metrics={{{name!r}: {(paths or scalars)[0]!r}}}",
        )
        for name, paths in found.items()
        if len(paths) != 1
    ]
    raise_all(ConfigError, _HEADLINE, problems)
    return {name: paths[0] for name, paths in found.items()}


def add_state_metrics(
    metrics: Mapping[str, jax.Array], found: Mapping[str, str], state: Any
) -> dict[str, jax.Array]:
    """Adds copies of scalars of a state, which the next update donates; waits for nothing.

    Raises ConfigError if the loss returns a metric of such a name.
    """
    why = "is a metric that the loss returns"
    taken = [
        Problem(f"metrics[{name!r}]", why, "another name") for name in found if name in metrics
    ]
    raise_all(ConfigError, _HEADLINE, taken)
    leaves = leaves_by_path(state) if found else {}
    return {**metrics, **{name: jnp.copy(leaves[path]) for name, path in found.items()}}
