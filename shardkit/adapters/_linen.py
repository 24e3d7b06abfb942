"""`sk.from_linen`: a flax linen module and its variable collections as pure functions."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta, unfreeze
from flax.errors import ScopeParamShapeError

from .._core.errors import Problem, StepError, raise_all
from .._core.own_sharding import on_any_mesh
from .._core.signatures import call_problem
from .._core.tree import leaves_by_path, short_type
from .._core.types import Batch, Key, Loss, Params, Trainable, Variables
from ..nn._manual_axis_rules import on_shards
from ._arguments import check_model, loss_problems, take_inputs
from ._model import Model, accept_key, pad_axes, split_loss_output

# Collections that a forward pass writes for its caller, and that the next pass does not read.
_OUTPUTS = ("intermediates", "losses", "perturbations")


def from_linen(
    module: nn.Module,
    loss: Callable[..., Any],
    batch: Batch,
    *,
    inputs: str | Sequence[str] | Callable[[Any], Any] = "x",
    train: Mapping[str, Any] | None = None,
    evaluate: nn.Module | Mapping[str, Any] | None = None,
    rngs: Sequence[str] = ("dropout",),
    mutable: Sequence[str] = (),
    trainable: Trainable = None,
) -> Model:
    """Turns a flax linen module into the `init` and `loss_fn` of a step.

    Args:
      module: the module.
      loss: `(outputs, batch) -> loss` or `(outputs, batch, key) -> loss`, with the results that
        `sk.StepSpec` allows; `outputs` is what the module returns.
      batch: pytree of arrays or `jax.ShapeDtypeStruct`, the batch of the `sk.StepSpec`; the module
        is initialised with zeros of these shapes.
      inputs: the module's arguments in a batch: a key, several keys for several arguments, or a
        function of the batch that returns an argument or a tuple of them.
      train: keyword arguments of the module in training, such as `{"train": True}`.
      evaluate: the same in `step.evaluate`, such as `{"train": False}`; or the module to call
        there without arguments of its own, such as `Net(deterministic=True)`.
      rngs: names of the random streams that the module draws from besides `params`.
      mutable: collections that the module sows, such as `("losses", "intermediates")`. With them
        `outputs` is `(y, collections)`, as `module.apply(..., mutable=...)` returns it.
      trainable: the parameters that are trained, the others are frozen: globs over paths, a
        predicate, or a tree of booleans, as for `sk.StepSpec`.

    Returns:
      A `Model`. Logical axes are those of `nn.with_logical_partitioning` and
      `nn.with_partitioning`; as in a `PartitionSpec`, dims after the last name have none. Every
      collection but `params` and the sown ones, such as batch statistics, is in
      `state.model_state`.

    Raises:
      StepError: the module cannot be called so, or the batch lacks its inputs; the module sows
        losses that `mutable` does not name, or the evaluation module has other variables.

    >>> import jax, flax.linen as nn
    >>> batch = {"x": jax.numpy.ones((8, 4))}
    >>> model = from_linen(nn.Dense(2), lambda y, batch: (y ** 2).mean(), batch)
    >>> sorted(jax.eval_shape(model.init, jax.random.key(0)))
    ['bias', 'kernel']
    """
    check_model(chain(_module_problems(module), loss_problems(loss, ("outputs", "batch"))))
    call, arguments = accept_key(loss), _make_argument_getter(inputs)
    training = _Form(module, train or {})
    own = isinstance(evaluate, nn.Module)
    evaluation = _Form(evaluate, {}) if own else _Form(module, evaluate or {})
    outputs_only = (*_OUTPUTS, *mutable)
    given = arguments(take_inputs(batch, inputs))
    forms = {"train": training} if own else {"train": training, "evaluate": evaluation}
    check_model(p for name, form in forms.items() for p in form.problems(name, given))

    def init(key: Key) -> Any:
        variables = training.init(key, rngs, given)
        params = jax.tree.map(_with_axes, variables.pop("params", {}), is_leaf=_is_boxed)
        model_state = {name: x for name, x in variables.items() if name not in outputs_only}
        return Variables(params, meta.unbox(model_state)) if model_state else params

    shapes = training.shapes(rngs, given)
    _check_sown(shapes, mutable)
    if own:
        _check_same_variables(shapes, evaluation.shapes(rngs, given), outputs_only)
    stateful = not {*shapes} <= {"params", *outputs_only}

    def run(form: _Form, params: Params, batch: Batch, key: Key, model_state: Any) -> Any:
        collections = model_state or {}
        module_key, loss_key = jax.random.split(key)
        streams = dict(zip(rngs, jax.random.split(module_key, len(rngs)), strict=True))
        outputs, updated = form.apply(
            {"params": params, **collections},
            *arguments(batch),
            rngs=streams,
            mutable=[*collections, *mutable],
        )
        written = unfreeze(updated)
        sown = {name: written.pop(name) for name in mutable if name in written}
        outputs = (outputs, sown) if mutable else outputs
        value, metrics = split_loss_output(call(outputs, batch, loss_key))
        return (value, metrics, written) if stateful else (value, metrics)

    def run_train(params: Params, batch: Batch, key: Key, model_state: Any = None) -> Any:
        return run(training, params, batch, key, model_state)

    def run_evaluate(params: Params, batch: Batch, key: Key, model_state: Any = None) -> Any:
        return run(evaluation, params, batch, key, model_state)

    def bind(params: Params, model_state: Any = None) -> Callable[..., Any]:
        return lambda *args: evaluation.apply({"params": params, **(model_state or {})}, *args)

    return Model(init, Loss(run_train, run_evaluate, stateful, trainable), bind)


@dataclasses.dataclass(frozen=True)
class _Form:
    """A module with the keyword arguments that it is called with."""

    module: nn.Module
    options: Mapping[str, Any]

    def problems(self, name: str, args: tuple[Any, ...]) -> Iterator[Problem]:
        """Whether the module can be called with these arguments and the options of this name."""
        call = inspect.unwrap(type(self.module).__call__)
        if why := call_problem(call, ("self", *args), self.options):
            fix = 'train={"train": True}, evaluate={"train": False}: arguments that it has by name'
            yield Problem(
                f"{name}={dict(self.options)}", f"{type(self.module).__name__} {why}", fix
            )

    def init(self, key: Key, rngs: Sequence[str], args: tuple[Any, ...]) -> dict[str, Any]:
        """Initialises the module with zeros of the shapes of its arguments."""
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), args)
        streams = dict(zip(("params", *rngs), jax.random.split(key, 1 + len(rngs)), strict=True))
        return unfreeze(self.module.init(streams, *zeros, **self.options))

    def shapes(self, rngs: Sequence[str], args: tuple[Any, ...]) -> dict[str, Any]:
        """The variables of the module, abstract."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        return meta.unbox(on_any_mesh(jax.eval_shape)(lambda key: self.init(key, rngs, args), key))

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the module; raises StepError for a shard of a parameter whose size it fixes."""
        try:
            with nn.intercept_methods(_drop_names):
                return self.module.apply(variables, *args, **kwargs, **self.options)
        except ScopeParamShapeError as error:
            if not on_shards():
                raise
            why = f"{str(error).partition(' (http')[0]}: a linen module fixes the sizes of its own"
            why += " parameters, so it cannot compute with one device's shard of them"
            fix = 'mode="auto"; or flax nnx, whose layers read the sizes of their arrays'
            headline = 'mode="shard_map" cannot split this module over an axis of its products.'
            raise StepError.of(headline, type(self.module).__name__, why, fix) from error


def _drop_names(
    method: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    """Calls a method of a module whose initializers name no dims.

    `DenseGeneral` evaluates its initializers for their shapes, and constrains them to their names,
    which are logical axes; flax would look for them in the mesh of the step. The module is the copy
    that flax has bound for this call.
    """
    for field in dataclasses.fields(context.module):
        initializer = getattr(context.module, field.name, None)
        if field.name.endswith("_init") and callable(initializer):
            bare = functools.partial(_initialize_bare, initializer)
            object.__setattr__(context.module, field.name, bare)
    return method(*args, **kwargs)


def _initialize_bare(initializer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    value = initializer(*args, **kwargs)
    return value.value if isinstance(value, nn.Partitioned) else value


def _check_sown(shapes: Mapping[str, Any], mutable: Sequence[str]) -> None:
    """Refuses to drop what a module sows for its loss; `sow` collects values in tuples."""
    unread = [
        (name, leaves_by_path(tree, name))
        for name, tree in shapes.items()
        if name not in (*mutable, "params", "intermediates", "perturbations")
    ]
    problems = [
        Problem(f"{path} {short_type(x.shape, x.dtype)}", "is sown, and the loss never sees it")
        for name, found in unread
        for path, x in found.items()
        if name == "losses" or path.endswith("/0")
    ]
    names = tuple(name for name, _ in unread)
    fix = (
        f"from_linen(..., mutable={names!r}), and loss((y, sown), batch) adds what it needs of sown"
    )
    raise_all(StepError, "The module sows what is not used.", problems, fix)


def _check_same_variables(
    train: Mapping[str, Any], evaluate: Mapping[str, Any], outputs: Sequence[str]
) -> None:
    """Refuses an evaluation module that is not the trained one in another mode."""
    trained, evaluated = (
        {
            path: short_type(x.shape, x.dtype)
            for name, tree in variables.items()
            if name not in outputs
            for path, x in leaves_by_path(tree, name).items()
        }
        for variables in (train, evaluate)
    )
    problems = [
        Problem(path, f"is {trained.get(path, 'missing')} in training, {kind} in evaluation")
        for path, kind in evaluated.items()
        if trained.get(path) != kind
    ]
    # Batch statistics of a layer that only training has are no variable of the evaluation.
    fix = "evaluate=module.copy(deterministic=True), the same module in another mode"
    raise_all(StepError, "The evaluation module has other variables.", problems, fix)


def _make_argument_getter(
    inputs: str | Sequence[str] | Callable[[Any], Any],
) -> Callable[[Any], tuple[Any, ...]]:
    if isinstance(inputs, str):
        return lambda batch: (batch[inputs],)
    if isinstance(inputs, Sequence):
        return lambda batch: tuple(batch[name] for name in inputs)

    def get(batch: Batch) -> tuple[Any, ...]:
        arguments = inputs(batch)
        return arguments if isinstance(arguments, tuple) else (arguments,)

    return get


def _module_problems(module: Any) -> Iterator[Problem]:
    if isinstance(module, nn.Module):
        return
    if isinstance(module, type):
        why, fix = f"is the class {module.__name__}", f"sk.from_linen({module.__name__}(...), ...)"
    else:
        why = f"is of type {type(module).__name__}"
        fix = "sk.from_linen(Net(...), loss, batch); sk.from_nnx for modules of flax.nnx"
    yield Problem("module", f"{why}, not a module of flax.linen", fix)


def _is_boxed(x: Any) -> bool:
    return isinstance(x, meta.AxisMetadata)


def _with_axes(x: Any) -> Any:
    return pad_axes(x.value, x.names) if isinstance(x, nn.Partitioned) else x
