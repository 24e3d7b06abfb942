"""For the tests of research code: one device against a mesh, collectives, budgets, mutations."""

from typing import TYPE_CHECKING

from .._core.startup import lazy_names

if TYPE_CHECKING:
    from . import mutations as mutations
    from ._asserts import assert_collectives as assert_collectives
    from ._asserts import assert_matches_one_device as assert_matches_one_device
    from ._asserts import assert_within as assert_within
    from ._kill_matrix import KillMatrix as KillMatrix
    from ._kill_matrix import MutationResult as MutationResult
    from ._kill_matrix import kill_matrix as kill_matrix
    from ._parallel_mutations import CONTEXT_MUTATIONS as CONTEXT_MUTATIONS
    from ._parallel_mutations import EXPERT_MUTATIONS as EXPERT_MUTATIONS
    from ._parallel_mutations import PIPELINE_MUTATIONS as PIPELINE_MUTATIONS
    from ._rare_mutations import RARE_MUTATIONS as RARE_MUTATIONS
    from ._shard_mutations import SHARD_MUTATIONS as SHARD_MUTATIONS
    from ._simulated_process import simulated_devices as simulated_devices
    from .mutations import MUTATIONS as MUTATIONS
    from .mutations import ZERO_MUTATIONS as ZERO_MUTATIONS
    from .mutations import Mutation as Mutation
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "mutations": None,
            "assert_collectives assert_matches_one_device assert_within": "._asserts",
            "KillMatrix MutationResult kill_matrix": "._kill_matrix",
            "CONTEXT_MUTATIONS EXPERT_MUTATIONS PIPELINE_MUTATIONS": "._parallel_mutations",
            "RARE_MUTATIONS": "._rare_mutations",
            "SHARD_MUTATIONS": "._shard_mutations",
            "simulated_devices": "._simulated_process",
            "MUTATIONS ZERO_MUTATIONS Mutation": ".mutations",
        },
    )
