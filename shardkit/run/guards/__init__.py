"""Guards: where numbers stop being finite, when they spike, and whether replicas agree."""

from ._dump import Dump, dump_manifest, read_dump, write_dump
from ._origin import Origin, first_nonfinite
from ._replay import Replay, abstract_batch, replay
from ._replicas import Mismatch, ReplicaComparison, check_replicas
from ._spikes import Spike, SpikeDetector

__all__ = [
    "Dump",
    "Mismatch",
    "Origin",
    "Replay",
    "ReplicaComparison",
    "Spike",
    "SpikeDetector",
    "abstract_batch",
    "check_replicas",
    "dump_manifest",
    "first_nonfinite",
    "read_dump",
    "replay",
    "write_dump",
]
