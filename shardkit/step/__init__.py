"""compile_step: a declaration becomes one checked, compiled, read-back training step."""

from ._compile_step import compile_step
from ._compiled import CompiledStep
from ._declaration import Declaration
from ._nonfinite import SKIPPED, OnNonfinite, released

__all__ = ["SKIPPED", "CompiledStep", "Declaration", "OnNonfinite", "compile_step", "released"]
