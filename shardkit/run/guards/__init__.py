"""Guards: where numbers stop being finite, when they spike, and whether replicas agree."""

from ._dump import Dump as Dump
from ._dump import dump_manifest as dump_manifest
from ._dump import read_dump as read_dump
from ._dump import write_dump as write_dump
from ._origin import Origin as Origin
from ._origin import first_nonfinite as first_nonfinite
from ._replay import Replay as Replay
from ._replay import abstract_batch as abstract_batch
from ._replay import replay as replay
from ._replicas import Mismatch as Mismatch
from ._replicas import ReplicaComparison as ReplicaComparison
from ._replicas import check_replicas as check_replicas
from ._spikes import Spike as Spike
from ._spikes import SpikeDetector as SpikeDetector
