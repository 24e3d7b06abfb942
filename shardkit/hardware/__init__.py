"""What public sources say of the devices that steps are compiled for."""

from ._chips import CHIPS, Chip, chip_of, find_chip, known_chips
from ._gpu_target import gpu_target_config
from ._measure import measure_cpu
from ._table import hardware_table

__all__ = [
    "CHIPS",
    "Chip",
    "chip_of",
    "find_chip",
    "gpu_target_config",
    "hardware_table",
    "known_chips",
    "measure_cpu",
]
