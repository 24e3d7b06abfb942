"""The state that a step carries."""

from ._state import TrainState

__all__ = ["TrainState"]
