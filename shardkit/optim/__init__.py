"""Where the state of an optax chain lives."""

from ._follow import FollowParams, moment_spec

__all__ = ["FollowParams", "moment_spec"]
