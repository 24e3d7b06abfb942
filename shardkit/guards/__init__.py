"""Numbers watched: where they stop being finite, when they spike, whether replicas agree."""

from ._dump import Dump, dump_manifest, read_dump, write_dump
from ._origin import Origin, first_nonfinite
from ._replicas import Mismatch, Replicas, check_replicas
from ._spikes import Spike, Spikes

__all__ = [
    "Dump",
    "Mismatch",
    "Origin",
    "Replicas",
    "Spike",
    "Spikes",
    "check_replicas",
    "dump_manifest",
    "first_nonfinite",
    "read_dump",
    "write_dump",
]
