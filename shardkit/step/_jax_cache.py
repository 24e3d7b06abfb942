"""JAX's persistent cache of executables: what a program took from it, and compiling without it."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import Mesh

from .._core.tracing import SETTINGS


def loses_order(mesh: Mesh) -> bool:
    """Whether an executable from a file could deadlock on a mesh.

    XLA's CPU compiler has the collectives of a program in one order. An executable that comes from
    a file lost it (jaxlib 0.10.2): with few processors its devices wait for each other in different
    collectives, until XLA ends the process.
    """
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"


@contextlib.contextmanager
def record_cache_hits() -> Iterator[list[str]]:
    """Records each program that this thread loads from the cache."""
    hits: list[str] = []
    thread = threading.get_ident()

    def listen(event: str, **_: str | int) -> None:
        if event == "/jax/compilation_cache/cache_hits" and threading.get_ident() == thread:
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


@dataclasses.dataclass
class _Setting:
    """A setting of the whole process, which the first thread changes and the last restores."""

    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    threads: int = 0
    before: bool = True

    def count(self, more: int) -> None:
        """JAX reads its setting after a reset."""
        with self.lock:
            if not self.threads:
                self.before = SETTINGS.jax_enable_compilation_cache
            self.threads += more
            jax.config.update("jax_enable_compilation_cache", self.before and not self.threads)
            reset_cache()


_SETTING = _Setting()


@contextlib.contextmanager
def without_jax_cache(mesh: Mesh | None = None) -> Iterator[None]:
    """Compiles anew, whatever JAX's cache holds; with a mesh only if it `loses_order`."""
    if mesh is not None and not loses_order(mesh):
        yield
        return
    _SETTING.count(+1)
    try:
        yield
    finally:
        _SETTING.count(-1)
