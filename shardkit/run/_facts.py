"""What decides the numbers of a run, as plain values.

All processes of a run compare these facts before its first update. Checkpoints hold them too, so
that a run resumes only with those that it had, or with changes that `train.resume_with` accepts.
"""

import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .._core.errors import StepError
from .._core.own_sharding import on_any_mesh, without_constraints
from .._core.tree import leaves_by_path, short_type
from .._core.types import Key, Params, Variables, strip_axes
from .._core.versions import package_versions, utc_time
from ..checkpoint import compute_fingerprints, fingerprint_values, format_fingerprint
from ..nn._manual_axis_rules import ShardMapLoss
from ..processes import ProcessGroup
from ..step import CompiledStep, build_objective, call_update
from ._config import TrainConfig
from ._console import is_simulated

# Options of JAX that change numbers, and variables of the environment that change programs.
_FLAGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_threefry_partitionable",
    "jax_default_prng_impl",
    "jax_numpy_dtype_promotion",
    "jax_random_seed_offset",
    "jax_softmax_custom_jvp",
    "jax_high_dynamic_range_gumbel",
)
# Options of the compiler, of which the traced program says nothing.
_COMPILER = (
    "jax_optimization_level",
    "jax_disable_most_optimizations",
    "jax_exec_time_optimization_effort",
    "jax_memory_fitting_level",
    "jax_memory_fitting_effort",
    "jax_compiler_enable_remat_pass",
)
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
# How many devices are simulated, and what is dumped where, is no matter of numbers.
_IGNORED_XLA_FLAGS = re.compile(r"--xla_(force_host_platform_device_count|dump_\w+)=\S*")
# Process 0 alone has these, see `Trainer`.
_OF_FIRST_PROCESS = ("loggers", "profile")


def agree_on_run(
    process_group: ProcessGroup, config: TrainConfig, **declared: Any
) -> dict[str, Any]:
    """Raises ProcessError in all processes, before anything is compiled, unless runs are equal.

    `declared` is what else must be the same, as plain values. Returns seed, flags, environment and
    versions.
    """
    variables = {name: os.environ.get(name, "") for name in _VARIABLES}
    variables["XLA_FLAGS"] = " ".join(_IGNORED_XLA_FLAGS.sub("", variables["XLA_FLAGS"]).split())
    facts = {
        "seed": config.seed,
        "flags": _flags(_FLAGS),
        "environment": variables | _flags(_COMPILER),
        "versions": package_versions(),
    }
    fields = dataclasses.asdict(config)
    shared = {name: value for name, value in fields.items() if name not in _OF_FIRST_PROCESS}
    process_group.agree("run", train=shared, **declared, **facts)
    return facts


def _flags(names: Sequence[str]) -> dict[str, str]:
    """Options of JAX; some are values of the process only, and a version may lack one."""
    values = jax.config.values
    return {name: str(getattr(jax.config, name, values.get(name, ""))) for name in names}


def agree_on_step(
    process_group: ProcessGroup, step: CompiledStep, saved: Mapping[str, Any]
) -> dict[str, Any]:
    """Raises ProcessError in all processes, before the first update, unless programs are equal.

    `saved` are the facts of the checkpoint that the run resumes from, if any. Returns what the step
    was declared of, see `facts_of_step`.
    """
    mesh, facts = step.mesh, facts_of_step(step, saved)
    placed = {"mesh": dict(mesh.shape), "devices": [device.id for device in mesh.devices.flat]}
    process_group.agree("step", program=step.program.digest, **placed, **facts)
    return facts


def agree_on_state(process_group: ProcessGroup, state: Any) -> None:
    """Raises ProcessError in all processes, with fingerprints, unless their states are equal."""
    if process_group.count > 1:
        sums = jax.device_get(compute_fingerprints(leaves_by_path(state)))
        texts = {path: format_fingerprint(value) for path, value in sums.items()}
        process_group.agree("state", state=texts)


def agree_on_given(process_group: ProcessGroup, given: Mapping[str, Any]) -> None:
    """Raises ProcessError in all processes unless what a state was created of is equal.

    Of a leaf that is split over processes each one reads its own shard only, so that their states
    are equal whatever they were given. A value that no process has in whole is part of the state.
    """
    if process_group.count > 1:
        texts = {
            path: format_fingerprint(fingerprint_values(x))
            for path, x in leaves_by_path(strip_axes(dict(given))).items()
            if not isinstance(x, jax.Array) or x.is_fully_addressable
        }
        process_group.agree("given", given=texts)


def facts_of_step(step: CompiledStep, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what was declared, without mesh and layout, on which it may resume.

    Loss, optimizer and init are hashes of their programs on one device, constants included and
    sharding constraints left out. A `jax.shard_map` on a mesh of the model's own is part of it.
    They take about as long as tracing the step. A step whose executable has the name of the one
    that a checkpoint was made with is the same program, so they are `saved` ones then; `init` is
    what the run began with.
    """
    spec, executable = step.spec, step.program.kept_as
    if executable and executable == saved.get("executable"):
        programs = {name: saved[name] for name in ("init", *_PROGRAMS)}
    else:
        programs = _digest_programs(step)
    return {
        **programs,
        "executable": executable,
        "precision": {k: str(v) for k, v in dataclasses.asdict(spec.precision).items()},
        "compression": dataclasses.asdict(spec.strategy.compression)
        if spec.strategy.compression
        else {},
        "on_nonfinite": spec.on_nonfinite,
        "compiler_options": {
            "deterministic": str(spec.deterministic),
            **{name: str(value) for name, value in spec.compiler_options.items()},
        },
        "batch": _types(spec.batch),
        "leaves": _types(step.layout.state),
    }


def _digest_programs(step: CompiledStep) -> dict[str, str]:
    """Traces and lowers init, loss and optimizer of a step."""
    spec, unplaced = step.spec, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    loss = spec.loss_fn
    losses = (loss.local, loss.reference) if isinstance(loss, ShardMapLoss) else (loss,)
    state = jax.tree.map(unplaced, step.layout.state)
    trained = step.layout.partition.trained(state.params)

    def init(key: Key) -> Any:
        made = spec.init(key)
        tree = (made.params, made.model_state) if isinstance(made, Variables) else made
        return strip_axes(tree)

    def update(grads: Params, opt_state: Any, params: Params) -> Any:
        # What an optimizer asks for beside the gradient is of the loss, which has its own hash.
        value = jnp.zeros(())
        return call_update(
            spec.optimizer,
            grads,
            opt_state,
            params,
            value,
            value_and_grad=lambda moved: (value, moved),
        )

    return {
        "init": _digest(init, state.key),
        "loss": " ".join(
            _digest(build_objective(loss), state.params, state.model_state, spec.batch, state.key)
            for loss in losses
        ),
        "optimizer": f"{_digest(update, trained, state.opt_state, trained)} "
        f"{_digest(spec.optimizer.init, trained)}",
    }


def _types(tree: Any) -> dict[str, str]:
    return {path: short_type(x.shape, x.dtype) for path, x in leaves_by_path(tree).items()}


def _digest(function: Callable[..., Any], *args: Any) -> str:
    """Returns 16 hexadecimal digits of a program; "" for one that only runs on shards.

    A loss of shards is that of one which has all rows: every axis that it names has size 1.
    """
    program = jax.jit(without_constraints(function))
    try:
        text = on_any_mesh(lambda *args: program.lower(*args).as_text())(*args)
    except (StepError, NotImplementedError, TypeError, ValueError):
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# These may change when a run resumes: newer packages, another machine, what it began with. Leaves
# that differ are named when they are restored. The first group of software is known before a step.
SOFTWARE = (("versions", "environment"), ("compiler_options",))
_NOT_COMPARED = (*itertools.chain(*SOFTWARE), "init", "leaves", "executable")
_PROGRAMS = ("loss", "optimizer")
FACT_NAMES = ("seed", "flags", "precision", "compression", "on_nonfinite", "batch", *_PROGRAMS)


def comparable_facts(
    before: Mapping[str, Any], now: Mapping[str, Any], *, programs: bool
) -> list[str]:
    """Returns the groups of facts by which a run and its checkpoint can be compared.

    Loss and optimizer are compared only if `programs`: they are other programs for other leaves,
    and in other versions of JAX.
    """
    same = all(before.get(name) == now.get(name) for name in ("versions", "leaves"))
    comparable = programs and same
    skipped = _NOT_COMPARED if comparable else (*_NOT_COMPARED, *_PROGRAMS)
    return [name for name in before if name in now and name not in skipped]


def environment(mesh: Mesh) -> dict[str, Any]:
    """Returns mesh, device, versions and UTC time, for the first row of the metrics."""
    device = mesh.devices.flat[0]
    return {
        "mesh": dict(mesh.shape),
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": mesh.size,
            "simulated": is_simulated(mesh),
        },
        "versions": package_versions(),
        "time": utc_time(),
    }
