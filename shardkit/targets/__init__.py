"""Compiles steps for absent devices, each in a child process."""

from ._child import TargetCompileError, UserCodeError, compile_for
from ._devices import build_target_mesh
from ._source import StepSource

__all__ = ["StepSource", "TargetCompileError", "UserCodeError", "build_target_mesh", "compile_for"]
