"""Versions and date behind a number: of Python, of the packages that decide it, and of today.

    {"python": "3.12.4", "jax": "0.12.0", "jaxlib": "0.12.0", "flax": "0.12.12", …}

Only a package that is installed has a version; shardkit has none when it runs from a checkout.
"""

import importlib.metadata
import platform
import time

_PACKAGES = ("shardkit", "jax", "jaxlib", "flax", "optax", "numpy")


def package_versions(*others: str) -> dict[str, str]:
    """Returns the versions of Python and of the packages that determine the numbers of a run.

    Args:
      *others: names of further packages.
    """
    installed = filter(_is_installed, (*_PACKAGES, *others))
    versions = {name: importlib.metadata.version(name) for name in installed}
    return {"python": platform.python_version(), **versions}


def utc_time() -> str:
    """Returns the time now as `2026-11-29T07:20:00Z`."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _is_installed(name: str) -> bool:
    """Whether a distribution is installed; shardkit is not when it runs from a checkout."""
    return any(True for _ in importlib.metadata.distributions(name=name))
