"""The chips that steps are compiled for: public figures, each with its source."""

from ._chips import CHIPS as CHIPS
from ._chips import Chip as Chip
from ._chips import find_chip as find_chip
from ._chips import identify_chip as identify_chip
from ._chips import known_chips as known_chips
from ._gpu_target import gpu_target_config as gpu_target_config
from ._measure import measure_cpu as measure_cpu
from ._table import hardware_table as hardware_table
