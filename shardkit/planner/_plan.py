"""`sk.plan`: which mesh for this model on these devices?"""

import time
from collections.abc import Sequence

import jax

from .._core.errors import MeshError, Problem, format_problems, raise_all
from ..hardware import CHIPS, Chip
from ..mesh import Target
from ..step import StepSpec, check_step_spec
from ._messages import assumptions, placed, refuse
from ._result import Plan, front_of
from ._search import Search
from ._sensitivity import sensitivity, with_batch, with_memory
from ._space import SearchSpace, searched_axes


def plan(
    spec: StepSpec,
    target: str,
    *,
    global_batch: int | None = None,
    space: SearchSpace | None = None,
    overlap: float = 0.0,
    hardware: Sequence[Chip] = (),
) -> Plan:
    """Estimates every layout of a model on a target, and ranks those that fit.

    The state is exact: rules are resolved on every mesh. Activations, FLOPs and collectives come
    from the traced loss, whose dims are followed by their logical axes; so it works for any
    model whose parameters or activations name them, and for others over `data` and `fsdp`.

    Args:
      spec: loss, optimizer, init, batch and precision; its layout is not used.
      target: `tpu:v5p:8x8x8`, `gpu:h100:4x8`: devices of the hardware table, or of `hardware`.
      global_batch: rows of the batch, instead of the spec's.
      space: what is tried; everything by default.
      overlap: share of communication that computing hides. 0, which is what the TPU compiler
        does with all but permutes.
      hardware: chips of your own, which `target` may name as it names others.

    Returns:
      The plan. Its figures are modelled.

    Raises:
      MeshError: `spec` is no `StepSpec`, a number cannot be, the target is no known device, no
        layout is legal, or none fits; with the reason of each that was left out, and the smallest
        change that fits.

    >>> import jax.numpy as jnp, optax, shardkit as sk
    >>> spec = sk.StepSpec(
    ...     loss_fn=lambda w, x, key: jnp.mean((x @ w) ** 2), optimizer=optax.sgd(0.1),
    ...     init=lambda key: jnp.zeros((64, 64)), batch=jax.ShapeDtypeStruct((8, 64), "float32"),
    ...     strategy=sk.strategies.data())
    >>> made = plan(spec, "tpu:v5e:2x2", space=Space(axes=("data",)))
    >>> dict(made.best.mesh)
    {'data': 4}
    """
    start = time.monotonic()
    check_step_spec(spec, MeshError, "The plan cannot be made.")
    _check(global_batch, overlap)
    wanted, declared = _known(target, hardware), _with_rows(spec, global_batch)
    search = Search.of(declared, wanted, space or SearchSpace(), overlap, hardware)
    if space is None and search.has_experts:
        search.space = SearchSpace(searched_axes(experts=True))
    found = search.run()
    rows = sorted((c for c in found.candidates if c.margin >= 0), key=lambda c: c.seconds)
    tight = sorted((c for c in found.candidates if c.margin < 0), key=lambda c: c.seconds)
    if not rows:
        refuse(wanted, found, tight)
    took = time.monotonic() - start
    others, none_left = sensitivity(search, front_of([*rows, *tight]))
    return Plan(
        target=str(wanted),
        rows=tuple(rows),
        tight=tuple(tight),
        rejected=found.rejected,
        considered=found.considered,
        took=took,
        changes=(*with_memory(rows[0], tight), *with_batch(search, rows[0]), *none_left),
        sensitivity=others,
        assumptions=(*assumptions(search.machine), placed(declared.strategy, search.space.axes)),
        problems=found.problems,
    )


def _check(rows: int | None, overlap: float) -> None:
    problems = []
    if rows is not None and rows < 1:
        problems.append(Problem(f"global_batch={rows}", "is no number of rows", "global_batch=128"))
    if not 0 <= overlap <= 1:
        why = "is no share of communication, which is between 0 and 1"
        problems.append(Problem(f"overlap={overlap:g}", why, "overlap=0.5"))
    raise_all(MeshError, "The plan cannot be made.", problems)


def _known(target: str, hardware: Sequence[Chip]) -> Target:
    wanted = Target.parse(target, hardware)
    if not wanted.chip:
        why = "nothing is known of the speed of these devices"
        fix = f"one of {', '.join(CHIPS)}: tpu:v5p:4x4x4, gpu:h100:1x8"
        raise MeshError(
            format_problems("There is nothing to plan for.", [Problem(target, why)], fix)
        )
    return wanted


def _with_rows(spec: StepSpec, rows: int | None) -> StepSpec:
    if rows is None:
        return spec
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]) if x.shape else (), x.dtype),
        spec.batch,
    )
    return spec.replace(batch=batch)
