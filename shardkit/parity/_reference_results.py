"""The results of one device with their noise, which the results of a mesh are held to."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._core.errors import VerificationError, count
from .._core.row_dims import RowDims
from .._core.tree import short_dtype
from ..rules import format_mesh
from ..step import CompiledStep, StepSpec, find_partition
from ._compare import MARGIN, ErrorLimits, compare_with_reference
from ._nudges import nudge_grads, nudge_params
from ._observe import observe
from ._parity_report import ParityRow
from ._record import METRICS, OWN_PROGRAM, ParityInputs, Record, clipped_sgd, copy_to_host
from ._reference import Reference

_NUDGES = 3
_FINE = 1e-5  # a rounding of f32 is 1.2e-7, of f16 1e-3


class ReferenceResults:
    """The results of one device, and how far a correct step may be from them.

    Attributes:
      spec: of the step.
      inputs: that the reference and every mesh run on.
      record: of the reference.
    """

    def __init__(
        self, spec: StepSpec, device: Any, inputs: ParityInputs, row_dims: RowDims | None = None
    ) -> None:
        """Runs the reference, and again with nudged parameters to measure noise.

        For `row_dims` see `Reference`. Raises VerificationError if the loss or its gradient is not
        finite, or the gradient is all zero.
        """
        self.spec, self.inputs = spec, inputs
        reference = Reference(spec, device, row_dims)
        start = reference.init(inputs.key)
        metrics, grads, _ = reference.gradients(start, inputs.batch(0), 0)
        _check_usable(metrics)
        trained = find_partition(spec, start.params).trained(start.params)
        self._sgd = clipped_sgd(copy_to_host(trained), copy_to_host(grads))
        self.record = reference.run(inputs, start, self._sgd)
        self._dtypes = spec.precision.compute_dtypes(start.params)
        reduce = _coarser(spec.precision.reduce_dtype, self._dtypes.lowest)
        self._limits = ErrorLimits.of(self._dtypes.lowest, reduce)

        def nudged(seed: int, roundings: float) -> Record:
            compute = spec.precision.compute_dtype
            params = nudge_params(start.params, compute, seed, roundings)
            moved = dataclasses.replace(start, params=params)
            return reference.run(
                inputs, moved, self._sgd, nudge_grads(reduce, seed) if reduce else None
            )

        self._noise_records = [nudged(seed, 1.0) for seed in range(_NUDGES)]
        # Metrics may count rows; where roundings are small, no row is as near to a tie.
        coarse = self.record[METRICS] and jnp.finfo(self._dtypes.lowest).eps > _FINE
        ways = [(seed, way) for seed in range(_NUDGES) for way in (-MARGIN, MARGIN)]
        self._wide_records = [nudged(*way) for way in ways] if coarse else []

    def compare(self, step: CompiledStep, checks: Collection[str] = OWN_PROGRAM) -> list[ParityRow]:
        """Runs a step on the same inputs and compares.

        Of the checks that compile a program of their own, only `checks` run.
        """
        mesh = format_mesh(step.mesh.shape)
        observed = observe(step, self.inputs, self._sgd, checks)
        return compare_with_reference(
            mesh,
            observed,
            self.record,
            self._noise_records,
            self._limits,
            wide_records=self._wide_records,
        )

    @property
    def title(self) -> str:
        """What is compared, in one line."""
        n = self.spec.accumulate.micro_batches
        micro = f", {n} micro-batches" if n > 1 else ""
        compute = short_dtype(jnp.dtype(self._dtypes.lowest))
        steps = count(self.inputs.steps, "step")
        return f"One device against each mesh: {steps}, compute {compute}{micro}."


def _coarser(dtype: str | None, than: str) -> str | None:
    """A dtype if it has larger roundings than another one."""
    return dtype if dtype and jnp.finfo(dtype).eps > jnp.finfo(than).eps else None


def _check_usable(metrics: Any) -> None:
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if np.isfinite(loss) and np.isfinite(norm) and norm > 0:
        return
    why = (
        f"loss {loss:g}, gradient norm {norm:g} on one device: a comparison proves nothing. "
        "Without batches= they are random"
    )
    fix = "verify(..., batches=[...]) with batches that the loss can use"
    headline = "The reference cannot be compared with."
    raise VerificationError.of(headline, "batches", why, fix)
