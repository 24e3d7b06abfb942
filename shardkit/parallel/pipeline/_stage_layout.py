"""Which layers each stage works on, and how they come there from where they are stored.

Parameters are stored with their `layers` dim cut into equal runs, as a sharding must have them.
Where stages are even and not interleaved, that is where they are used. Otherwise runs of
layers move once per step, each straight to its stage, and their gradients move back.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._core.errors import Problem

# (from stage, its run) → (to stage, its run)
_Move = tuple[tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts that the layers are cut into, part `c · stages + s` for virtual stage c of stage s.

    Attributes:
      axis: the mesh axis of the stages.
      stages: its size.
      sizes: layers of each part, in the order of the model.
    """

    axis: str
    stages: int
    sizes: tuple[int, ...]

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return sum(self.sizes)

    @property
    def depth(self) -> int:
        """Layers of the largest part; smaller ones leave the rest unused."""
        return max(self.sizes)

    @property
    def even(self) -> bool:
        """Whether all parts have the same number of layers."""
        return len(set(self.sizes)) == 1

    @property
    def stored_apart(self) -> bool:
        """Whether each stage stores a run of the layers; else every stage stores them all."""
        return self.layers % self.stages == 0

    @property
    def numbers(self) -> np.ndarray:
        """i32[stages, chunks, depth]: which layer stands where; `layers` for none."""
        starts = np.cumsum([0, *self.sizes])
        table = np.full((len(self.sizes), self.depth), self.layers, np.int32)
        for part, size in enumerate(self.sizes):
            table[part, :size] = np.arange(starts[part], starts[part] + size)
        return table.reshape(-1, self.stages, self.depth).swapaxes(0, 1)

    def fetch(self, stored: Any, stage: jax.Array) -> Any:
        """Brings the layers of a stage together, inside a `shard_map` over the axis.

        Args:
          stored: pytree of `[layers of the run, …]`.
          stage: i32[], number of the stage.

        Returns:
          The same with `[chunks, depth, …]`; unused places are 0.
        """
        return jax.tree.map(lambda x: self._fetched(x, stage), stored)

    def give_back(self, grads: Any, stage: jax.Array) -> Any:
        """Brings gradients `[chunks, depth, …]` to where their layers are stored."""
        return jax.tree.map(lambda x: self._given_back(x, stage), grads)

    def _fetched(self, x: jax.Array, stage: jax.Array) -> jax.Array:
        shape = (len(self.sizes) // self.stages, self.depth, *x.shape[1:])
        if not self.stored_apart:
            places = jnp.asarray(self.numbers)[stage]
            return x.at[places].get(mode="fill", fill_value=0)
        if not self._rounds:
            return x.reshape(shape)
        runs, places = x.reshape(-1, self._run, *x.shape[1:]), math.prod(shape[:2]) // self._run
        out = jnp.zeros((places, *runs.shape[1:]), x.dtype)
        for moves in self._rounds:
            src, dst = self._indices(moves, stage, len(runs), places)
            out = out.at[dst].set(self._sent(runs[src], moves), mode="drop")
        return out.reshape(shape)

    def _given_back(self, x: jax.Array, stage: jax.Array) -> jax.Array:
        if not self.stored_apart:
            places = jnp.asarray(self.numbers)[stage]
            return jnp.zeros((self.layers, *x.shape[2:]), x.dtype).at[places].add(x, mode="drop")
        own = self.layers // self.stages
        if not self._rounds:
            return x.reshape(own, *x.shape[2:])
        runs = x.reshape(-1, self._run, *x.shape[2:])
        out = jnp.zeros((own // self._run, *runs.shape[1:]), x.dtype)
        for moves in self._rounds:
            back = [(dst, src) for src, dst in moves]
            src, dst = self._indices(back, stage, len(runs), len(out))
            out = out.at[dst].set(self._sent(runs[src], back), mode="drop")
        return out.reshape(own, *x.shape[2:])

    def _sent(self, run: jax.Array, moves: Sequence[_Move]) -> jax.Array:
        pairs = [(src[0], dst[0]) for src, dst in moves]
        if all(a == b for a, b in pairs):
            return run
        return jax.lax.ppermute(run, self.axis, pairs)

    def _indices(
        self, moves: Sequence[_Move], stage: jax.Array, sources: int, places: int
    ) -> tuple[jax.Array, jax.Array]:
        """This stage's run to send (any, if none) and place of what it gets (outside, if none)."""
        table = np.tile(np.array([[sources - 1], [places]], np.int32), self.stages)
        for (src, run), (dst, place) in moves:
            table[0, src], table[1, dst] = run, place
        mine = jnp.asarray(table)[:, stage]
        return mine[0], mine[1]

    @property
    def _run(self) -> int:
        """Layers that move together: a whole part, where parts are even."""
        return self.sizes[0] if self.even else 1

    @property
    def _rounds(self) -> list[list[_Move]]:
        """Moves in rounds, in each of which a stage sends and gets at most one run.

        None at all where every stage stores what it works on, in that order.
        """
        waiting = list(self._moves())
        if all(src == dst for src, dst in waiting):
            return []
        rounds = []
        while waiting:
            taken, busy = [], (set[int](), set[int]())
            for move in waiting:
                ends = move[0][0], move[1][0]
                local = taken and (taken[0][0][0] == taken[0][1][0]) != (ends[0] == ends[1])
                if ends[0] not in busy[0] and ends[1] not in busy[1] and not local:
                    taken.append(move)
                    busy[0].add(ends[0])
                    busy[1].add(ends[1])
            waiting = [move for move in waiting if move not in taken]
            rounds.append(taken)
        return rounds

    def _moves(self) -> Iterator[_Move]:
        run, stored = self._run, self.layers // self.stages
        for stage, chunks in enumerate(self.numbers):
            for place, layer in enumerate(chunks.reshape(-1)[::run]):
                if layer < self.layers:
                    source, first = divmod(int(layer), stored)
                    yield (source, first // run), (stage, place)


def part_sizes(
    layers: int, stages: int, virtual: int, declared: tuple[int, ...] | None
) -> tuple[tuple[int, ...], list[Problem]]:
    """Layers of each part, even or as declared, and what is wrong with that."""
    parts = stages * virtual
    even = (layers // parts,) * parts
    if declared is None:
        if layers % parts == 0:
            return even, []
        why = f"{layers} layers do not split evenly into {_parts(stages, virtual)}"
        return even, [Problem("layers_per_stage=None", why, _choices(layers, parts))]
    wrong = []
    if len(declared) != parts:
        wrong.append(f"has {len(declared)} entries for {_parts(stages, virtual)}")
    if sum(declared) != layers:
        wrong.append(f"adds up to {sum(declared)}, the model has {layers} layers")
    subject = f"layers_per_stage={declared}"
    return declared, [Problem(subject, why, _choices(layers, parts)) for why in wrong]


def most_even(layers: int, parts: int) -> tuple[int, ...]:
    """Layers of each part where no two differ by more than one.

    >>> most_even(5, 4)
    (2, 1, 1, 1)
    """
    low, more = divmod(layers, parts)
    return tuple(low + (n < more) for n in range(parts))


def _parts(stages: int, virtual: int) -> str:
    return f"{stages} stages" + (f" of {virtual} virtual stages" if virtual > 1 else "")


def _choices(layers: int, parts: int) -> str:
    """Legal declarations: the most even one, and the numbers of layers that need none."""
    low, more = divmod(layers, parts)
    near = f"{max(1, low) * parts} or {(max(1, low) + 1) * parts} layers"
    same = f"layers_per_stage={most_even(layers, parts)}"
    return same if more == 0 and low else f"{same}, or a model of {near}"
