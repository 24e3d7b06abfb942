"""What public sources say of the devices that steps are compiled for."""

from ._chips import CHIPS, Chip, chip_of
from ._gpu_target import gpu_target_config

__all__ = ["CHIPS", "Chip", "chip_of", "gpu_target_config"]
