"""Proves that a step gives the results of one device on every mesh."""

from ._default_meshes import default_meshes
from ._parity_report import ParityReport, ParityRow, format_error
from ._random_batches import make_random_batches
from ._record import ParityInputs
from ._reference_results import ReferenceResults
from ._verify import (
    StepFactory,
    as_step_factory,
    build_one_device_mesh,
    verify,
)

__all__ = [
    "ParityInputs",
    "ParityReport",
    "ParityRow",
    "ReferenceResults",
    "StepFactory",
    "as_step_factory",
    "build_one_device_mesh",
    "default_meshes",
    "format_error",
    "make_random_batches",
    "verify",
]
