"""Nested mappings, such as the config of a run, as one mapping from paths to values."""

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested mappings by path, in order.

    An empty mapping is itself a value, so that a group without entries is not lost.

    Args:
      tree: nested mappings; anything else, such as a list, is a value.
      separator: between the names of a path.
      prefix: before every path.

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
