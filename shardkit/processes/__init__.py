"""Several processes of one program: they join, agree, and end together when one fails."""

from ._cluster import detected_cluster as detected_cluster
from ._cluster import process_count as process_count
from ._distributed import distributed as distributed
from ._failure import PEER_FAILED as PEER_FAILED
from ._failure import STUCK as STUCK
from ._failure import Failure as Failure
from ._launch import launch as launch
from ._membership import membership as membership
from ._process_group import ProcessGroup as ProcessGroup
