"""Pipeline parallelism: splits layers into stages that pass micro-batches on.

`x[M, B, D] · W[L_pipe, D, D] → x[M, B, D]`, stage s computes micro-batch i after stage s−1.

Collectives per step, A bytes of one device's rows as a `[batch, length, embed]` activation: one A
over each stage boundary forward and one backward, in micro-batches; each tick of a schedule's
bubble sends one micro-batch more. Parameters outside the layers are stored on every stage (or
split, `outer_params="split"`) and used on the first and last stage alone; their gradients are
summed over the stages once per step. Layers that are also split over `fsdp` are gathered once per
step, not once per micro-batch, and their gradients are reduced once.

Bubble: (p−1)/(m+p−1) of the time with GPipe and 1F1B, (p−1)/(vm+p−1) interleaved, (p−1)/(3m+p−1)
with a zero-bubble schedule; see `_schedule` for their tables. A stage's backward pass recomputes
its forward pass from its input, as under full remat.

Overrides of parts of a layer also work inside a stage: attention over a split length, experts that
tokens are sent to. The partitioner splits the axes of rows that move, so an `expert` axis, and
`context`, reduce the gradients of a stage once per micro-batch.

Use when the layers do not fit even with tensor and fsdp, or links between groups of devices are
slow: it sends the fewest bytes of all kinds. Do not use with few micro-batches per stage.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, final

import jax
import jax.numpy as jnp

from ..._core.errors import Problem, StepError, raise_all
from ..._core.split_rng import key_problems
from ..._core.types import Accumulate, Batch, Key, Params
from ..._core.without_gradient import without_gradient
from ...nn._layer_stack import First, Last, Layer, stop_aux_gradients
from ...nn._overridable import Override, StepContext, Ticks, without_overrides
from .._kind import Kind, PlanChoice, spare_share
from .._names import activations, check_strategy, choice_problems, params
from .._strategy import Strategy
from ._schedule import SCHEDULES, PipelineSchedule, forward_only
from ._schedule import schedule as tick_table
from ._spmd_program import LayerStackCall, PipelineProgram
from ._stage_layout import StageLayout, stage_sizes

if TYPE_CHECKING:
    from ...report import LedgerRow
    from ...report import Program as Compiled

_FROM_PARAMS = Problem(
    "the batch of sk.nn.layer_stack",
    "is computed from parameters, and a pipeline takes no gradient through it",
    "parameters in outer_params, and what is computed of them inside `first`, `layer` or `last`",
)


def pipeline_bytes(n: int, activation: float) -> float:
    """Bytes per device: one A over each of n − 1 stage boundaries, each way; mean over n stages.

    A is the activations of all micro-batches of one device.

    >>> pipeline_bytes(4, 1000), pipeline_bytes(2, 1000)
    (1500.0, 1000.0)
    """
    return activation * 2 * (n - 1) / n


def pipeline(
    axis: str = "pipe",
    *,
    schedule: str = "1f1b",
    micro_batches: int,
    virtual_stages: int = 1,
    layers_per_stage: Sequence[int] | None = None,
    outer_params: str = "replicated",
) -> Strategy:
    """Splits the layers into stages over a mesh axis.

    The model calls `sk.nn.layer_stack`. Its rows are split into strided micro-batches (micro-batch
    i has rows i, i + m, i + 2m, …), whose gradients are accumulated and reduced once. Random draws
    equal those of one device for the whole batch, so dropout is the same for any number of stages
    and micro-batches.

    Args:
      axis: name of the mesh axis.
      schedule: `"1f1b"`, `"gpipe"`, `"interleaved"` or `"zero_bubble"`.
      micro_batches: how many micro-batches each device's rows are split into.
      virtual_stages: chunks of layers on each stage; at least 2 for `"interleaved"`, else 1.
      layers_per_stage: number of layers of each stage if it is uneven, in the order of the model;
        with virtual stages one entry for each of these. Layers are stored evenly: if the number of
        stages does not divide theirs, add `.with_names(params={"layers": None})`, which stores all
        layers on every stage.
      outer_params: `"replicated"` stores the parameters outside the layers on every stage,
        `"split"` splits those with a `vocab` dim over the stages and gathers them once per step.

    Returns:
      A strategy for models that call `sk.nn.layer_stack` and name the leading dim of their layers
      `layers`.

    Raises:
      StepError: an option is not legal, alone or with the schedule.

    >>> pipeline(micro_batches=4).kinds
    (Pipeline(axis='pipe'),)
    """
    problems = choice_problems(
        schedule=(schedule, SCHEDULES), outer_params=(outer_params, ("replicated", "split"))
    )
    problems += _number_problems(schedule, micro_batches, virtual_stages, layers_per_stage)
    check_strategy("pipeline", axis, problems)
    split = {"layers": axis, "vocab": axis} if outer_params == "split" else {"layers": axis}
    override = PipelinedLayers(
        axis=axis,
        schedule=schedule,
        micro_batches=micro_batches,
        virtual_stages=virtual_stages,
        layers_per_stage=None if layers_per_stage is None else tuple(layers_per_stage),
    )
    return Strategy(
        params=params(split),
        activations=activations({}),
        kinds=(Pipeline(axis),),
        overrides=(("layer_stack", override),),
    )


@final
@dataclasses.dataclass(frozen=True)
class Pipeline(Kind):
    """Layers split over an axis, in stages."""

    name: ClassVar[str] = "pipeline"
    splits = frozenset({"layers"})
    collectives = frozenset({"all-reduce", "collective-permute", "all-gather", "reduce-scatter"})
    override = "layer_stack"
    planned = "pipeline"
    not_planned = ("uneven stages",)
    factory = staticmethod(pipeline)
    sweep_by_default = False

    def minimum(self, program: "Compiled") -> float | None:
        """Huang et al. 2019; and gradients of the other parameters, reduced as for `data`."""
        # All micro-batches together are the rows of one device, so their number does not matter.
        activation = program.declared.activation_bytes
        if activation is None:
            return None
        n = program.sizes[self.axis]
        return self.gradient_all_reduce_bytes(program) + pipeline_bytes(n, activation)

    def excess(
        self, row: "LedgerRow", rows: "Sequence[LedgerRow]", program: "Compiled"
    ) -> Iterator[tuple[str, float]]:
        """Exchanges at ticks in which only some of the stages have something to pass on."""
        activation = program.declared.activation_bytes
        if row.kind == "collective-permute" and activation is not None:
            least = pipeline_bytes(program.sizes[self.axis], activation)
            yield "over stage boundaries that pass nothing on", spare_share(row, rows, least)

    def planned_options(self, choice: PlanChoice) -> Mapping[str, Any]:
        """The chosen schedule; without one, options that lay out its parameters."""
        return choice.pipeline or {"schedule": "1f1b", "micro_batches": 1}


def _number_problems(name: str, micro: object, virtual: object, sizes: object) -> list[Problem]:
    """Whether sizes add up to the model's layers is only known when it is traced."""
    problems = []
    if type(micro) is not int or micro < 1:
        problems.append(Problem(f"micro_batches={micro!r}", "is not a positive int", "at least 1"))
    if type(virtual) is not int or (virtual > 1) != (name == "interleaved"):
        why = "only the interleaved schedule has virtual stages, at least 2"
        fix = 'schedule="interleaved", virtual_stages=2'
        problems.append(Problem(f"virtual_stages={virtual!r} with {name!r}", why, fix))
    legal = isinstance(sizes, Sequence) and sizes and all(type(n) is int and n >= 0 for n in sizes)
    if sizes is not None and not legal:
        why = "is not a sequence of numbers of layers, one for each stage"
        problems.append(Problem(f"layers_per_stage={sizes!r}", why, "layers_per_stage=(2, 1)"))
    return problems


@final
@dataclasses.dataclass(frozen=True)
class PipelinedLayers(Override):
    """Overrides `sk.nn.layer_stack` with a pipeline."""

    schedule: str  # name of the schedule
    micro_batches: int  # m
    virtual_stages: int = 1  # v
    # layers of each virtual stage, or None for even ones
    layers_per_stage: tuple[int, ...] | None = None

    @property
    def row_parts(self) -> int:
        """Micro-batches of each device's rows."""
        return self.micro_batches

    def incompatibilities(self, accumulate: Accumulate, reduce_separately: bool) -> list[Problem]:
        """Refuses another accumulation with one reduction, and a separate reduction dtype."""
        problems = []
        if accumulate.reduce == "end" and accumulate.micro_batches > 1:
            why = "the pipeline accumulates its own micro-batches, with one reduction"
            k = accumulate.micro_batches
            fix = f"pipeline(micro_batches={self.micro_batches * k}), or "
            fix += f'sk.Accumulate({k}, reduce="every"), which runs the pipeline {k} times'
            problems.append(Problem(f"accumulate={k}", why, fix))
        elif reduce_separately:
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
        outer_params: Params,
        layers: Params,
        batch: Batch,
        key: Key | None,
    ) -> Any:
        """Returns what `sk.nn.layer_stack` does; gradients are computed together with the loss."""
        headline = "The pipeline does not fit the mesh, the batch or the model."
        raise_all(StepError, headline, self._problems(around, layers, batch, key))
        sizes, _ = self._sizes(around, layers)
        layout = StageLayout(self.axis, around.mesh.shape[self.axis], sizes)
        call = LayerStackCall(
            first=first, layer=layer, last=last, outer_params=outer_params, batch=batch, key=key
        )
        with without_overrides():  # shapes do not depend on them
            problems = [*call.closure_problems(layers)]
            raise_all(StepError, "The pipeline needs every parameter as an argument.", problems)
            program = PipelineProgram.of(call, layers, around, layout, self.micro_batches)

        # Every array is an argument: inside a user's `jax.jit` or scan, JAX calls `forward` after
        # the trace that made these arrays has ended.
        @jax.custom_vjp
        def run(*args: Any) -> Any:
            return program.evaluate(self._build(layout.stages, forward_only), *args)

        def forward(*args: Any) -> tuple[Any, Any]:
            trained = jax.tree.map(lambda x: x.perturbed, args[:2])
            values = jax.tree.map(lambda x: x.value, args)
            return program.train(self._build(layout.stages, tick_table), trained, *values)

        def backward(grads: Any, cotangent: Any) -> Any:
            scale = program.scale(cotangent)
            return *jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), None, None

        run.defvjp(forward, backward, symbolic_zeros=True)
        batch = jax.tree.map(functools.partial(without_gradient, _FROM_PARAMS), batch)
        # What a rule of its own returns has a gradient, for JAX, in its weight and metrics too.
        return stop_aux_gradients(run(outer_params, layers, batch, program.words))

    def tick_table(self, sizes: Mapping[str, int]) -> tuple[str, Ticks] | None:
        """The table of a training step; None where one device holds all layers."""
        stages = sizes.get(self.axis, 1)
        if stages < 2:
            return None
        return self.schedule, self._build(stages, tick_table).labels

    def _build(self, stages: int, build: Callable[..., PipelineSchedule]) -> PipelineSchedule:
        return build(
            self.schedule,
            stages=stages,
            micro_batches=self.micro_batches,
            virtual_stages=self.virtual_stages,
        )

    def _sizes(self, around: StepContext, layers: Any) -> tuple[tuple[int, ...], list[Problem]]:
        depth, stages = len(jax.tree.leaves(layers)[0]), around.mesh.shape[self.axis]
        return stage_sizes(depth, stages, self.virtual_stages, self.layers_per_stage)

    def _problems(self, around: StepContext, layers: Any, batch: Any, key: Any) -> list[Problem]:
        """Everything that mesh, layers, rows and key do not allow."""
        sizes, m = dict(around.mesh.shape), self.micro_batches
        _, problems = self._sizes(around, layers)
        p = sizes[self.axis]
        if self.schedule == "interleaved" and m % p:
            why = f"interleaving sends micro-batches in groups of {self.axis}={p}"
            fix = f"micro_batches={max(p, round(m / p) * p)}"
            problems.append(Problem(f"micro_batches={m}", why, fix))
        if self.axis in around.row_axes:
            why = "splits the rows of the batch, but every stage needs all of them"
            problems.append(Problem(f"mesh axis {self.axis!r}", why, "batch over another axis"))
        unit = m * math.prod(sizes[axis] for axis in around.row_axes)
        rows = {len(x) for x in jax.tree.leaves(batch) if jnp.ndim(x)}
        for n in sorted(n for n in rows if n % unit):
            split = "".join(f" x {axis}={sizes[axis]}" for axis in around.row_axes)
            why = f"{n} rows do not divide by micro_batches={m}{split}"
            near = f"a multiple of {unit} rows, such as {max(unit, round(n / unit) * unit)}"
            problems.append(Problem("batch", why, near))
        return problems + (key_problems(key.dtype) if key is not None else [])
