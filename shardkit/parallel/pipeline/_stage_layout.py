"""Which layers each stage works on, and how they get there from where they are stored.

Parameters are stored with their `layers` dim cut into equal runs, as a sharding requires. Where
stages are even and not interleaved, each stage stores what it works on. Otherwise layers move once
per step, each straight to its stage, and their gradients move back.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from ..._core.errors import Problem
from ..._core.types import PyTree

# A block of layers that moves: (from stage, its block there) → (to stage, its block there).
_Move = tuple[tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class StageLayout:
    """The parts that layers are cut into, part `c · stages + s` for virtual stage c of stage s."""

    axis: str  # the mesh axis of the stages
    stages: int  # its size
    sizes: tuple[int, ...]  # layers of each part, in the order of the model

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return sum(self.sizes)

    @property
    def depth(self) -> int:
        """Layers of the largest part; smaller parts are padded to it."""
        return max(self.sizes)

    @property
    def is_even(self) -> bool:
        """Whether all parts have the same number of layers."""
        return len(set(self.sizes)) == 1

    @property
    def is_stored_split(self) -> bool:
        """Whether each stage stores a run of the layers; else every stage stores them all."""
        return self.layers % self.stages == 0

    @property
    def numbers(self) -> np.ndarray:
        """i32[stages, chunks, depth]: number of the layer at each place; `layers` for padding.

        >>> StageLayout("pipe", 2, (2, 1, 1, 1)).numbers.tolist()
        [[[0, 1], [3, 5]], [[2, 5], [4, 5]]]
        """
        starts = np.cumsum([0, *self.sizes])
        table = np.full((len(self.sizes), self.depth), self.layers, np.int32)
        for part, size in enumerate(self.sizes):
            table[part, :size] = np.arange(starts[part], starts[part] + size)
        return table.reshape(-1, self.stages, self.depth).swapaxes(0, 1)

    def gather_stage_layers(self, stored: PyTree, stage: jax.Array) -> PyTree:
        """Collects the layers of a stage, i32[] its number, inside a `shard_map` over the axis.

        `stored` is a pytree of `[stored layers, …]`; returns the same with `[chunks, depth, …]`, in
        which padding is 0.
        """
        return jax.tree.map(lambda x: self._gather(x, stage), stored)

    def scatter_stage_grads(self, grads: PyTree, stage: jax.Array) -> PyTree:
        """Sends gradients `[chunks, depth, …]` to where their layers are stored."""
        return jax.tree.map(lambda x: self._scatter(x, stage), grads)

    def _gather(self, x: jax.Array, stage: jax.Array) -> jax.Array:
        shape = (len(self.sizes) // self.stages, self.depth, *x.shape[1:])
        if not self.is_stored_split:
            numbers = jnp.asarray(self.numbers)[stage]
            return x.at[numbers].get(mode="fill", fill_value=0)
        rounds = self._rounds()
        if not rounds:
            return x.reshape(shape)
        blocks = x.reshape(-1, self._block, *x.shape[1:])
        places = math.prod(shape[:2]) // self._block
        return self._move(blocks, rounds, stage, places).reshape(shape)

    def _scatter(self, x: jax.Array, stage: jax.Array) -> jax.Array:
        if not self.is_stored_split:
            numbers = jnp.asarray(self.numbers)[stage]
            return jnp.zeros((self.layers, *x.shape[2:]), x.dtype).at[numbers].add(x, mode="drop")
        stored = self.layers // self.stages
        shape, rounds = (stored, *x.shape[2:]), self._rounds()
        if not rounds:
            return x.reshape(shape)
        back = [[(dst, src) for src, dst in moves] for moves in rounds]
        blocks = x.reshape(-1, self._block, *x.shape[2:])
        return self._move(blocks, back, stage, stored // self._block).reshape(shape)

    def _move(
        self, blocks: jax.Array, rounds: list[list[_Move]], stage: jax.Array, places: int
    ) -> jax.Array:
        """[places, …]: what rounds of moves bring to this stage; 0 where nothing arrives."""
        out = jnp.zeros((places, *blocks.shape[1:]), blocks.dtype)
        for moves in rounds:
            # For each stage, the block that it sends (any, if none) and the place of the one that
            # it receives (outside, and so dropped, if none).
            table = np.tile(np.array([[len(blocks) - 1], [places]], np.int32), self.stages)
            for (src, block), (dst, place) in moves:
                table[0, src], table[1, dst] = block, place
            send, receive = jnp.asarray(table)[:, stage]
            pairs = [(src[0], dst[0]) for src, dst in moves]
            arriving = blocks[send]
            if any(src != dst for src, dst in pairs):
                arriving = jax.lax.ppermute(arriving, self.axis, pairs)
            out = out.at[receive].set(arriving, mode="drop")
        return out

    @property
    def _block(self) -> int:
        """Layers that move together: a whole part where parts are even, else one."""
        return self.sizes[0] if self.is_even else 1

    def _rounds(self) -> list[list[_Move]]:
        """Moves in rounds, in each of which a stage sends and receives at most one block.

        None at all where every stage stores what it works on, in that order.
        """
        # 8 layers on 2 stages with 2 virtual stages each, so blocks of 2 layers:
        #             stored          worked on
        #   stage 0   01 23           01 45        block 0 stays, block 1 (23) goes to stage 1
        #   stage 1   45 67           23 67        block 0 (45) goes to stage 0, block 1 stays
        # Round 1: 01 and 67 stay, without a permute. Round 2: 23 and 45 change stages in one.
        waiting = list(self._list_moves())
        if all(src == dst for src, dst in waiting):
            return []
        rounds = []
        while waiting:
            moves: list[_Move] = []
            for move in waiting:
                (src, _), (dst, _) = move
                # A round is of local moves or of a permute, not of both.
                alike = not moves or (src == dst) == (moves[0][0][0] == moves[0][1][0])
                if alike and all(src != s[0] and dst != d[0] for s, d in moves):
                    moves.append(move)
            waiting = [move for move in waiting if move not in moves]
            rounds.append(moves)
        return rounds

    def _list_moves(self) -> Iterator[_Move]:
        block, stored = self._block, self.layers // self.stages
        for stage, chunks in enumerate(self.numbers):
            for place, layer in enumerate(chunks.reshape(-1)[::block]):
                if layer < self.layers:
                    source, first = divmod(int(layer), stored)
                    yield (source, first // block), (stage, place)


def stage_sizes(
    layers: int, stages: int, virtual: int, declared: tuple[int, ...] | None
) -> tuple[tuple[int, ...], list[Problem]]:
    """Layers of each part, even or as declared, and the problems of that."""
    parts = stages * virtual
    named = f"{stages} stages" + (f" of {virtual} virtual stages" if virtual > 1 else "")
    even = (layers // parts,) * parts
    if declared is None:
        if layers % parts == 0:
            return even, []
        why = f"{layers} layers do not split evenly into {named}"
        return even, [Problem("layers_per_stage=None", why, _suggest_sizes(layers, parts))]
    reasons = []
    if len(declared) != parts:
        reasons.append(f"has {len(declared)} entries for {named}")
    if sum(declared) != layers:
        reasons.append(f"adds up to {sum(declared)}, the model has {layers} layers")
    subject, fix = f"layers_per_stage={declared}", _suggest_sizes(layers, parts)
    return declared, [Problem(subject, why, fix) for why in reasons]


def balanced_sizes(layers: int, parts: int) -> tuple[int, ...]:
    """Layers of each part where no two differ by more than one.

    >>> balanced_sizes(5, 4)
    (2, 1, 1, 1)
    """
    low, remainder = divmod(layers, parts)
    return tuple(low + (n < remainder) for n in range(parts))


def _suggest_sizes(layers: int, parts: int) -> str:
    """The balanced declaration, and the numbers of layers that need none."""
    low, remainder = divmod(layers, parts)
    balanced = f"layers_per_stage={balanced_sizes(layers, parts)}"
    if low and not remainder:
        return balanced
    return f"{balanced}, or a model of {max(1, low) * parts} or {(max(1, low) + 1) * parts} layers"
