"""Pipeline parallelism: layers in stages, micro-batches passed from stage to stage.

`x[M, B, D] · W[L_pipe, D, D] → x[M, B, D]`, stage s works on micro-batch i when stage s−1 has.

Collectives per step, A bytes of one device's rows as a `[batch, length, embed]` activation: one A
over each stage boundary forward and one backward, in micro-batches; each tick of a schedule's
bubble sends one micro-batch more. Parameters before and after the layers are stored on every
stage (or split, `ends="split"`), work on the first and the last alone, and their gradients are
summed over the stages once per step. Layers that are split over `fsdp` besides are gathered
once per step, not per micro-batch, and reduced once.

Bubble: (p−1)/(m+p−1) of the time with GPipe and 1F1B, (p−1)/(vm+p−1) interleaved, (p−1)/(3m+p−1)
with a zero-bubble schedule; see `_schedule` for their tables. A stage's forward pass is computed
again in its backward pass, from its input, as under full remat.

What strategies carry out inside a layer they carry out inside a stage: attention over a split
length, experts that tokens travel to. Rows that travel stay the partitioner's, so an `expert` axis,
and `context`, reduce the gradients of a stage once per micro-batch.

Use when the layers do not fit beside tensor and fsdp splits, or links between groups of devices
are slow: it sends least of all kinds. Do not use with few micro-batches per stage.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

import jax
import jax.numpy as jnp

from ..._core.errors import Problem, StepError, did_you_mean, raise_all
from ..._core.types import Accumulate
from ...nn._layer_stack import First, Last, Layer
from ...nn._overridable import Override, StepContext, without_overrides
from .._kind import Choice, Kind
from .._names import activations, check_axis, params
from .._strategy import Strategy
from ._schedule import SCHEDULES, Schedule, forward_only
from ._schedule import schedule as tick_table
from ._spmd_program import Loss, Program
from ._stage_layout import Parts, part_sizes

if TYPE_CHECKING:
    from ...report import Program as Compiled


def pipeline_bytes(n: int, activation: float) -> float:
    """One A over each stage boundary, each way; of two stages each sends one way alone.

    Args:
      n: stages.
      activation: bytes of the activations of all micro-batches of one device.

    >>> pipeline_bytes(4, 1000), pipeline_bytes(2, 1000)
    (2000.0, 1000.0)
    """
    return activation * min(n - 1.0, 2.0)


def pipeline(
    axis: str = "pipe",
    *,
    schedule: str = "1f1b",
    micro_batches: int,
    virtual_stages: int = 1,
    layers_per_stage: Sequence[int] | None = None,
    ends: str = "replicated",
) -> Strategy:
    """Splits the layers into stages over a mesh axis.

    The model marks its layers with `sk.nn.layer_stack`. Its rows are split into strided
    micro-batches
    (row i of every `micro_batches`), which are this strategy's accumulation: their gradients are
    reduced once. Every random draw is what one device draws for the whole batch, so dropout
    is the same for any number of stages and micro-batches.

    Args:
      axis: name of the mesh axis.
      schedule: `"1f1b"`, `"gpipe"`, `"interleaved"` or `"zero_bubble"`.
      micro_batches: parts that each device's rows are split into.
      virtual_stages: parts of the layers that each stage holds, for `"interleaved"` at least 2.
      layers_per_stage: layers of each stage where they are uneven, in the order of the model;
        with virtual stages one entry for each of these. Stored layers are cut evenly: where the
        stages do not divide their number, add `.with_names(params={"layers": None})`, which
        stores all layers on every stage.
      ends: `"replicated"` stores the parameters outside the layers on every stage, `"split"` splits
        those with a `vocab` dim over the stages and gathers them once per step.


    Returns:
      A strategy for models that call `sk.nn.layer_stack` and name the leading dim of layers `layers`.

    Raises:
      StepError: no such schedule, or numbers that it cannot have.

    >>> pipeline(micro_batches=4).kinds
    (Pipeline(axis='pipe'),)
    """
    check_axis("pipeline", axis)
    problems = _option_problems(schedule, micro_batches, virtual_stages, ends)
    problems += _stage_problems(layers_per_stage)
    raise_all(StepError, "The pipeline is declared wrongly.", problems)
    split = {"layers": axis, "vocab": axis} if ends == "split" else {"layers": axis}
    sizes = None if layers_per_stage is None else tuple(layers_per_stage)
    override = Stages(axis, schedule, micro_batches, virtual_stages, sizes)
    return Strategy(
        params=params(split),
        activations=activations({}),
        kinds=(Pipeline(axis),),
        overrides=(("layer_stack", override),),
    )


@final
@dataclasses.dataclass(frozen=True)
class Pipeline(Kind):
    """Layers over an axis, in stages."""

    name: ClassVar[str] = "pipeline"
    splits = frozenset({"layers"})
    collectives = frozenset({"all-reduce", "collective-permute", "all-gather", "reduce-scatter"})
    override = "layer_stack"
    weighed = "pipeline"
    not_weighed = ("uneven stages",)
    make = staticmethod(pipeline)
    by_default = False

    def minimum(self, program: "Compiled") -> float | None:
        """Huang et al. 2019; and gradients of what every stage has, reduced as for `data`."""
        # Micro-batches together are the rows of one device, so their number does not matter.
        activation = program.declared.activation_bytes
        if activation is None:
            return None
        n = program.sizes[self.axis]
        return self.reduced_bytes(program) + pipeline_bytes(n, activation)

    def options(self, choice: Choice) -> Mapping[str, Any]:
        """The chosen schedule; without one, what any layout of its parameters needs."""
        return choice.pipeline or {"schedule": "1f1b", "micro_batches": 1}


def _option_problems(name: Any, micro: Any, virtual: Any, ends: Any) -> list[Problem]:
    problems = []
    if name not in tuple(SCHEDULES):
        why = f"known: {', '.join(SCHEDULES)}.{did_you_mean(str(name), SCHEDULES)}"
        problems.append(Problem(f"schedule={name!r}", why, 'schedule="1f1b"'))
    if type(micro) is not int or micro < 1:
        problems.append(Problem(f"micro_batches={micro!r}", "is no positive int", "at least 1"))
    if type(virtual) is not int or (virtual > 1) != (name == "interleaved"):
        why = "interleaving, and nothing else, needs at least 2 virtual stages"
        fix = 'schedule="interleaved", virtual_stages=2'
        problems.append(Problem(f"virtual_stages={virtual!r} with {name!r}", why, fix))
    if ends not in ("replicated", "split"):
        why = "known: replicated, split." + did_you_mean(str(ends), ("replicated", "split"))
        problems.append(Problem(f"ends={ends!r}", why, 'ends="split"'))
    return problems


def _stage_problems(sizes: Any) -> list[Problem]:
    """Whether they add up to the model's layers is known when it is traced."""
    if sizes is None:
        return []
    numbers = isinstance(sizes, Sequence) and all(type(n) is int and n >= 0 for n in sizes)
    if numbers and len(sizes):
        return []
    why = "is no sequence of numbers of layers, one for each stage"
    return [Problem(f"layers_per_stage={sizes!r}", why, "layers_per_stage=(2, 1)")]


@dataclasses.dataclass(frozen=True)
class Stages(Override):
    """Carries out `sk.nn.layer_stack` as a pipeline.

    Attributes:
      schedule: name of the schedule.
      micro_batches: m.
      virtual_stages: v.
      layers_per_stage: layers of each part, or None for even parts.
    """

    schedule: str
    micro_batches: int
    virtual_stages: int = 1
    layers_per_stage: tuple[int, ...] | None = None

    def incompatibilities(self, accumulate: Accumulate, apart: bool) -> list[Problem]:
        """Refuses a second loop over micro-batches inside which gradients are kept apart."""
        problems = []
        if accumulate.reduce == "end" and accumulate.micro_batches > 1:
            why = "the pipeline's own micro-batches are accumulated, with one reduction"
            fix = f"pipeline(micro_batches={self.micro_batches * accumulate.micro_batches})"
            fix += f', or sk.Accumulate({accumulate.micro_batches}, reduce="every") to fill it anew for each'
            problems.append(Problem(f"accumulate={accumulate.micro_batches}", why, fix))
        elif apart:
            why = "a pipeline reduces its gradients in the compute dtype"
            problems.append(
                Problem("precision.reduce_dtype", why, "sk.Precision(..., reduce_dtype=None)")
            )
        return problems

    def __call__(
        self,
        around: StepContext,
        plain: Callable[..., Any],
        first: First,
        layer: Layer,
        last: Last,
        ends: Any,
        layers: Any,
        batch: Any,
        key: Any,
    ) -> Any:
        """Returns what `sk.nn.layer_stack` does; the gradients are computed with the loss."""
        problems = self._problems(around, layers, batch, key)
        raise_all(StepError, "The pipeline cannot be laid out.", problems)
        sizes, _ = self._sizes(around, layers)
        cut = Parts(self.axis, around.mesh.shape[self.axis], sizes)
        loss = Loss(first, layer, last, ends, batch, key)
        with without_overrides():
            program = Program.of(loss, layers, around, cut, self.micro_batches)

        # Every array is an argument: inside of a user's `jax.jit` or scan, JAX calls `forward` when
        # the trace that these arrays are of has ended.
        @jax.custom_vjp
        def run(*args: Any) -> Any:
            return program.evaluate(self._table(cut, forward_only), *args)

        def forward(*args: Any) -> tuple[Any, Any]:
            return program.train(self._table(cut, tick_table), *args)

        def backward(grads: Any, cotangent: Any) -> Any:
            scale = program.scale(cotangent)
            return *jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), None, None

        run.defvjp(forward, backward)
        return run(ends, layers, batch, program.words)

    def _table(self, cut: Parts, build: Callable[..., Schedule]) -> Schedule:
        return build(
            self.schedule,
            stages=cut.stages,
            micro_batches=self.micro_batches,
            virtual_stages=self.virtual_stages,
        )

    def _sizes(self, around: StepContext, layers: Any) -> tuple[tuple[int, ...], list[Problem]]:
        depth, stages = len(jax.tree.leaves(layers)[0]), around.mesh.shape[self.axis]
        return part_sizes(depth, stages, self.virtual_stages, self.layers_per_stage)

    def _problems(self, around: StepContext, layers: Any, batch: Any, key: Any) -> list[Problem]:
        """What mesh, layers, rows and key do not allow, all of it."""
        sizes, m = dict(around.mesh.shape), self.micro_batches
        _, problems = self._sizes(around, layers)
        p = sizes[self.axis]
        if self.schedule == "interleaved" and m % p:
            why = f"interleaving sends micro-batches in groups of {self.axis}={p}"
            fix = f"micro_batches={max(p, round(m / p) * p)}"
            problems.append(Problem(f"micro_batches={m}", why, fix))
        if self.axis in around.rows:
            why = "splits the rows of the batch, but every stage sees all of them"
            problems.append(Problem(f"mesh axis {self.axis!r}", why, "batch over another axis"))
        unit = m * math.prod(sizes[axis] for axis in around.rows)
        rows = {len(x) for x in jax.tree.leaves(batch) if jnp.ndim(x)}
        for n in sorted(n for n in rows if n % unit):
            split = "".join(f" x {axis}={sizes[axis]}" for axis in around.rows)
            why = f"{n} rows do not split into micro_batches={m}{split}"
            near = f"a multiple of {unit} rows, such as {max(unit, round(n / unit) * unit)}"
            problems.append(Problem("batch", why, near))
        return problems + _key_problems(key)


def _key_problems(key: Any) -> list[Problem]:
    """Draws are split by rows as threefry has them; other generators cannot be."""
    if key is None:
        return []
    name = str(jax.random.key_impl(key))
    partitionable = jax.config.jax_threefry_partitionable  # pyright: ignore
    if name == "threefry2x32" and partitionable:
        return []
    why = "only draws of partitionable threefry keys can be split by rows"
    fix = 'jax.random.key(seed, impl="threefry2x32"), jax_threefry_partitionable=True'
    return [Problem(f"key of {name}", why, fix)]
