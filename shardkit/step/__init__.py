"""compile_step: a declaration becomes one checked, compiled, read-back training step."""

from ._compile_step import compile_step
from ._compiled import CompiledStep
from ._declaration import Declaration
from ._layout import Abstract, Layout, abstract_state, resolve_layout
from ._nonfinite import SKIPPED, OnNonfinite
from ._objective import objective

__all__ = [
    "SKIPPED",
    "Abstract",
    "CompiledStep",
    "Declaration",
    "Layout",
    "OnNonfinite",
    "abstract_state",
    "compile_step",
    "objective",
    "resolve_layout",
]
