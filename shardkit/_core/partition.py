"""Which leaves of the parameters are trained; the others are frozen.

The trained part of a tree is the same tree with None at each frozen leaf. JAX and optax leave None
out, so gradients, optimizer state and updates of the trained part have no entry for frozen leaves:

    params    {"base": {"w": …}, "lora": {"a": …, "b": …}}    trainable="lora/*"
    trained   {"base": {"w": None}, "lora": {"a": …, "b": …}}
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax

from .tree import path_str
from .types import Params

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Partition:
    """The trained and the frozen leaves of a tree of parameters."""

    frozen: frozenset[str] = frozenset()  # paths of the frozen leaves

    def trained(self, tree: Params) -> Params:
        """The tree with None at each frozen leaf; the tree itself if none is frozen."""
        if not self.frozen:
            return tree
        return jax.tree_util.tree_map_with_path(
            lambda path, x: None if path_str(path) in self.frozen else x, tree
        )

    def merge(self, trained: Params, full: Params) -> Params:
        """The full tree with the leaves of the trained part in place of its own."""
        if not self.frozen:
            return trained
        return jax.tree.map(
            lambda t, x: x if t is None else t, trained, full, is_leaf=lambda x: x is None
        )

    def of_trained(self, loss: Callable[..., T], params: Params) -> Callable[..., T]:
        """The loss as a function of the trained part; the frozen leaves are those of `params`."""
        if not self.frozen:
            return loss
        return lambda trained, *args: loss(self.merge(trained, params), *args)
