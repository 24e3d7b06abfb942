"""Several processes of one program: they join, agree, and end together when one fails."""

from ._cluster import detected_cluster, process_count
from ._distributed import distributed
from ._failure import PEER_FAILED, STUCK, Failure
from ._launch import launch
from ._membership import membership
from ._process_group import ProcessGroup

__all__ = [
    "PEER_FAILED",
    "STUCK",
    "Failure",
    "ProcessGroup",
    "detected_cluster",
    "distributed",
    "launch",
    "membership",
    "process_count",
]
