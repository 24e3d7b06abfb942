"""For the tests of research code: one device against a mesh, collectives, budgets, mutations."""

from . import mutations
from ._asserts import assert_collectives, assert_matches_one_device, assert_within
from ._expert_mutations import EXPERT_MUTATIONS
from ._matrix import Killed, KillMatrix, kill_matrix
from ._ring_mutations import CONTEXT_MUTATIONS
from ._shard_mutations import SHARD_MUTATIONS
from ._simulated import simulated_devices
from .mutations import MUTATIONS, PIPELINE_MUTATIONS, ZERO_MUTATIONS, Mutation

__all__ = [
    "CONTEXT_MUTATIONS",
    "EXPERT_MUTATIONS",
    "MUTATIONS",
    "PIPELINE_MUTATIONS",
    "SHARD_MUTATIONS",
    "ZERO_MUTATIONS",
    "KillMatrix",
    "Killed",
    "Mutation",
    "assert_collectives",
    "assert_matches_one_device",
    "assert_within",
    "kill_matrix",
    "mutations",
    "simulated_devices",
]
