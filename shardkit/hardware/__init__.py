"""The chips that steps are compiled for: public figures, each with its source."""

from ._chips import CHIPS, Chip, find_chip, identify_chip, known_chips
from ._gpu_target import gpu_target_config
from ._measure import measure_cpu
from ._table import hardware_table

__all__ = [
    "CHIPS",
    "Chip",
    "find_chip",
    "gpu_target_config",
    "hardware_table",
    "identify_chip",
    "known_chips",
    "measure_cpu",
]
