"""Nested mappings, such as settings of a run, as one mapping of paths to values."""

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Lists the values of nested mappings by path, in their order.

    An empty mapping is a value of its own: a group without entries is not the same as no group.

    Args:
      tree: nested mappings; everything else, lists included, is a value.
      separator: between the names of a path.
      prefix: before every path.

    Returns:
      Path → value.

    >>> flatten({"train": {"steps": 4, "profile": {}}, "name": "nano"})
    {'train.steps': 4, 'train.profile': {}, 'name': 'nano'}
    >>> flatten({"decoder": {"up": 1}}, separator="/")
    {'decoder/up': 1}
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, separator, f"{path}{separator}")
        else:
            flat[path] = value
    return flat
