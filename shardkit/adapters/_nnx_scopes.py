"""Named scopes for nnx modules: a module's call is in the scope of the attribute that holds it.

flax linen names scopes itself; nnx does not. While a step is traced, every class of the model calls
its `__call__` inside `jax.named_scope`, so that reports name parts of the model:

    class Net(nnx.Module):
        def __call__(self, x):
            return self.head(self.layers[0](x))     scopes `layers_0` and `head`
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx

# In the attributes of a module, where nnx's transformations copy it along.
_NAME = "_scope_in_report"
# The classes are the user's: two traces at once would restore each other's.
_TRACING = threading.RLock()


@contextlib.contextmanager
def named_scopes(module: nnx.Module) -> Iterator[None]:
    """Names the scopes of a module's parts inside the block, and leaves their classes as before.

    The module is an instance of one trace, which is marked.
    """
    with _TRACING, contextlib.ExitStack() as restored:
        classes = {}
        for path, part in nnx.iter_modules(module):
            if path and callable(part):
                vars(part)[_NAME] = _scope_name(path)
                classes[type(part)] = type(part).__call__
        for of, call in classes.items():
            own = vars(of).get("__call__")
            of.__call__ = _in_scope(call)
            restored.callback(_restore, of, own)
        yield


def _scope_name(path: Sequence[Any]) -> str:
    """The attribute at the end of a path, with the indices behind it.

    >>> _scope_name(("decoder", "layers", 0)), _scope_name(("head",))
    ('layers_0', 'head')
    """
    start = max((n for n, key in enumerate(path) if not str(key).isdigit()), default=0)
    return "_".join(map(str, path[start:]))


def _in_scope(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def scoped(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Taken while it runs: a class that calls the `__call__` of its base is one scope.
        name = vars(self).pop(_NAME, None)
        if name is None:
            return call(self, *args, **kwargs)
        try:
            with jax.named_scope(name):
                return call(self, *args, **kwargs)
        finally:
            vars(self)[_NAME] = name

    return scoped


def _restore(of: type[Any], own: Callable[..., Any] | None) -> None:
    if own is None:
        del of.__call__
    else:
        of.__call__ = own
