"""compile_step: a declaration becomes one checked, compiled, read-back training step."""

from ._compiled import CompiledStep, compile_step
from ._declaration import Declaration

__all__ = ["CompiledStep", "Declaration", "compile_step"]
