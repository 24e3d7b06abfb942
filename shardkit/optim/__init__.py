"""Where the state of an optax chain lives, and where an update is computed."""

from ._follow import FollowParams, moment_spec
from ._zero import Zero, update_specs

__all__ = ["FollowParams", "Zero", "moment_spec", "update_specs"]
