"""`Decoder`: the reference model, whose layers are stacked arrays and one scanned body.

Logical axes of parameters: `vocab`, `embed`, `layers`, `heads`, `kv_heads`, `head_dim`, `mlp`,
`experts` and `expert_mlp` of a mixture, and `norm` for the scales of norms. A scale has the size
of `embed`, but it is a few kilobytes that every device needs; with a name of its own it stays
replicated when `embed` is split, and needs no gather.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..nn._constrain import constrain
from ..nn._dot import matmul
from ..nn._layer_stack import Layer, scan_layers, split_layer_keys
from ..nn._manual_axis_rules import shard_offset
from ..nn._use_param import use_param
from ._block import IS_LOCAL, STREAM, WORK, DecoderBlock, Rotation, rope_angles
from ._cross_entropy import LogitRule
from ._decoder_config import DecoderConfig
from ._mixture import STATISTICS

_TRUNCATED_STD = 0.87962566103423978  # of a standard normal truncated at two deviations


def _param(value: jax.Array, *axes: str | None) -> nnx.Param:
    """Makes a parameter with logical axes; without `eager_sharding=False` flax needs a mesh."""
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


def _normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Draws f32 of standard deviation 1/√fan_in, truncated at two deviations."""
    scale = fan_in**-0.5 / _TRUNCATED_STD
    return scale * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)


def _dim_sizes(c: DecoderConfig) -> dict[str, int]:
    """Size of each logical axis of a layer's weights."""
    return {
        "embed": c.embed_dim,
        "norm": c.embed_dim,
        "heads": c.num_heads,
        "kv_heads": c.key_heads,
        "head_dim": c.head_size,
        "mlp": c.dense_width,
        "experts": c.experts or 0,
        "expert_mlp": c.expert_width,
    }


def _initial_scale(c: DecoderConfig, shape: tuple[int, ...]) -> jax.Array:
    return jnp.full(shape, 1 - c.norm_offset) if c.norm_offset else jnp.ones(shape)


class Layers(nnx.Module):
    """The weights of all blocks, f32, each stacked over a leading `layers` dim.

    Products start as truncated normals of deviation 1/√fan_in. Those that are added to the
    residual stream are also divided by √(2 · layers), so that the stream does not grow with
    depth. Every layer has its own key.

    Attributes:
      query: [layers, embed, heads, head_dim]; key, value: the same with kv_heads.
      out: [layers, heads, head_dim, embed].
      gate, up: [layers, embed, mlp]; down: [layers, mlp, embed]. With experts mlp is the width of
        the shared experts; without shared experts these are absent.
      router: [layers, embed, experts]; the `experts` dim has no name, since every device
        chooses among all experts.
      expert_gate, expert_up: [layers, experts, embed, expert_mlp].
      expert_down: [layers, experts, expert_mlp, embed].
      attn_norm, mlp_norm: [layers, embed]; attn_post_norm, mlp_post_norm too with
        `config.post_norms`. With LayerNorm each has a bias: attn_norm_bias, ….
      query_norm, key_norm: [layers, head_dim], only with `config.qk_norm`.
      query_bias, …: [layers, *outputs of the product], initially 0; only those of
        `config.biased`, and not in the chosen experts.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        c, sizes = config, _dim_sizes(config)
        depth = 2 * c.num_layers  # branches that add to the residual stream

        def stacked(fan_in: int, *dims: str, unnamed: str = "") -> nnx.Param:
            keys = jax.random.split(rngs.params(), c.num_layers)
            shape = tuple(sizes[dim] for dim in dims)
            value = jax.vmap(lambda key: _normal(key, shape, fan_in))(keys)
            return _param(value, "layers", *(None if dim == unnamed else dim for dim in dims))

        embed, kv = c.embed_dim, ("embed", "kv_heads", "head_dim")
        self.query = stacked(embed, "embed", "heads", "head_dim")
        self.key = stacked(embed, *kv)
        self.value = stacked(embed, *kv)
        mixed = c.num_heads * c.head_size
        self.out = stacked(mixed * depth, "heads", "head_dim", "embed")
        if c.dense_width:
            if c.gated:
                self.gate = stacked(embed, "embed", "mlp")
            self.up = stacked(embed, "embed", "mlp")
            self.down = stacked(c.dense_width * depth, "mlp", "embed")
        if c.experts is not None:
            wide, tall = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")
            self.router = stacked(embed, "embed", "experts", unnamed="experts")
            self.expert_gate = stacked(embed, *wide)
            self.expert_up = stacked(embed, *wide)
            self.expert_down = stacked(c.expert_width * depth, *tall)
        branches = ("attn_norm", "mlp_norm")
        self._add_norms(c, branches, embed)
        if c.post_norms:
            self._add_norms(c, ("attn_post_norm", "mlp_post_norm"), embed)
        if c.qk_norm:
            self._add_norms(c, ("query_norm", "key_norm"), c.head_size)
        if c.biased:
            self._add_biases(c, sizes)

    def _add_norms(self, c: DecoderConfig, names: tuple[str, ...], width: int) -> None:
        shape = (c.num_layers, width)
        for name in names:
            setattr(self, name, _param(_initial_scale(c, shape), "layers", "norm"))
            if c.norm == "layer" and width == c.embed_dim:
                setattr(self, f"{name}_bias", _param(jnp.zeros(shape), "layers", "norm"))

    def _add_biases(self, c: DecoderConfig, sizes: Mapping[str, int]) -> None:
        """Adds the biases of products; those added after a reduction have the axis `norm`."""
        heads = {"query": "heads", "key": "kv_heads", "value": "kv_heads"}
        dims = {name: (axis, "head_dim") for name, axis in heads.items()} | {"out": ("norm",)}
        if c.dense_width:
            dims |= {"gate": ("mlp",)} if c.gated else {}
            dims |= {"up": ("mlp",), "down": ("norm",)}
        for name in (name for name in dims if name in c.biased):
            outputs = dims[name]
            shape = (c.num_layers, *(sizes[dim] for dim in outputs))
            setattr(self, f"{name}_bias", _param(jnp.zeros(shape), "layers", *outputs))

    def weights(self) -> dict[str, jax.Array]:
        """The arrays by name, each with its leading `layers` dim."""
        return {name: x[...] for name, x in vars(self).items() if isinstance(x, nnx.Param)}


class Decoder(nnx.Module):
    """A decoder in flax nnx, from token ids to logits.

    It only names logical axes, so it does not change with the parallelism. Outside a compiled step
    the names have no effect, and the model is an ordinary nnx module.

    Attributes:
      config: the sizes.
      embedding: f32[vocab, embed], initialized with deviation 1/√embed. Here and in `head` vocab
        is `config.table_rows`.
      layers: the stacked blocks.
      norm: f32[embed], scale of the last norm; with LayerNorm there is norm_bias, f32[embed].
      positions: f32[positions, embed]; only with `config.positions`.
      head: f32[embed, vocab]; None with `config.tie_embeddings`.
      deterministic: whether dropout is off; `model.eval()` and `model.train()` set it.

    >>> from flax import nnx
    >>> import jax, jax.numpy as jnp
    >>> config = DecoderConfig(vocab=16, embed_dim=8, num_layers=2, num_heads=2, mlp_dim=16)
    >>> model = Decoder(config, nnx.Rngs(0))
    >>> hidden = model(jnp.zeros((1, 4), jnp.int32))
    >>> hidden.shape, model.logits(hidden).shape
    ((1, 4, 8), (1, 4, 16))
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        c = self.config = config
        table = _normal(rngs.params(), (c.table_rows, c.embed_dim), c.embed_dim)
        self.embedding = _param(table, "vocab", "embed")
        self.layers = Layers(c, rngs)
        self.norm = _param(_initial_scale(c, (c.embed_dim,)), "norm")
        self.head = self._untied_head(rngs)
        if c.norm == "layer":
            self.norm_bias = _param(jnp.zeros((c.embed_dim,)), "norm")
        if c.positions is not None:
            table = _normal(rngs.params(), (c.positions, c.embed_dim), c.embed_dim)
            self.positions = _param(table, None, "embed")
        self.deterministic = False

    def _untied_head(self, rngs: nnx.Rngs) -> nnx.Param | None:
        if self.config.tie_embeddings:
            return None
        shape = (self.config.embed_dim, self.config.table_rows)
        return _param(_normal(rngs.params(), shape, self.config.embed_dim), "embed", "vocab")

    def __call__(
        self, inputs: jax.Array, segment_ids: jax.Array | None = None, key: jax.Array | None = None
    ) -> jax.Array:
        """Returns the last norm's output, from which `logits` and the loss are computed.

        Args:
          inputs: i32[batch, length], token ids.
          segment_ids: i32[batch, length]; tokens attend to their own segment. None: one per row.
          key: draws dropout; without it, or if `deterministic`, nothing is dropped.

        Returns:
          [batch, length, embed] in the dtype of the parameters.
        """
        batch = {"inputs": inputs, "segment_ids": segment_ids}
        outer, weights = self.outer_params(), self.layer_params()
        keys = split_layer_keys(self.dropout_key(key), self.config.num_layers).layers
        x = self.first(outer, batch)
        x = scan_layers(self.layer(inputs.shape[1]), x, weights, batch, keys)
        return self.hidden(outer, self.split_sums(x)[0])

    def outer_params(self) -> dict[str, jax.Array]:
        """Returns the parameters outside the layers, by name."""
        names = ("embedding", "norm", "head", "norm_bias", "positions")
        own = vars(self)
        return {name: own[name][...] for name in names if own.get(name) is not None}

    def layer_params(self) -> dict[str, jax.Array]:
        """Returns the arrays `[layers, ...]` of the blocks, by name.

        Where only some layers see a window, a constant says which: layers are scanned, and a
        pipeline moves them.
        """
        c, weights = self.config, self.layers.weights()
        if not c.mixes_layers:
            return weights
        is_local = [0.0 if i in c.global_layers else 1.0 for i in range(c.num_layers)]
        return weights | {IS_LOCAL: jnp.asarray(is_local)}

    def dropout_key(self, key: jax.Array | None) -> jax.Array | None:
        """Returns the key if dropout is on, else None."""
        return key if self.config.dropout > 0 and not self.deterministic else None

    def embed(
        self,
        outer: Mapping[str, jax.Array],
        batch: Mapping[str, Any],
        _key: jax.Array | None = None,
    ) -> jax.Array:
        """Looks up `batch["inputs"]`; returns the residual stream before the first block.

        A learned table is read at `batch["positions"]`, i32[batch, length]; absent: from 0 on.
        """
        c = self.config
        with jax.named_scope("embedding"):
            # The table is gathered along `embed` before the lookup. Without this constraint the
            # partitioner exchanges activations between dims, in one program even unsplit ones.
            table = constrain(_table(outer), "vocab", "embed")
            # Not split along `length` yet, so that the table's gradient is summed in place.
            x = constrain(_look_up(table, batch["inputs"]), *WORK)
            x = constrain(x, *STREAM, source=WORK, partial=("vocab",))
            x = x if c.embed_scale == 1 else x * jnp.asarray(c.embed_scale, x.dtype)
            if c.positions is None:
                return x
            # Whole, as lengths of the batch are, until it meets the stream.
            table, at = use_param(outer["positions"], None, "embed"), batch.get("positions")
            if at is not None:
                return x + constrain(jnp.take(table, at, axis=0), *STREAM, source=WORK)
            positions = table[: batch["inputs"].shape[1]]
            return x + constrain(positions, *STREAM[1:], source=WORK[1:])

    def first(
        self,
        outer: Mapping[str, jax.Array],
        batch: Mapping[str, Any],
        _key: jax.Array | None = None,
    ) -> Any:
        """Returns the input of the first layer: the stream, with experts also zero sums."""
        x = self.embed(outer, batch)
        if self.config.experts is None:
            return x
        zero = jnp.zeros_like(x[:, 0, 0], jnp.float32)
        return x, dict.fromkeys(STATISTICS, zero)

    def layer(self, length: int) -> Layer:
        """Returns the block as a function `(weights, x, batch, key) -> x`, for one length.

        With experts `x` is the stream and the sums of `router_statistics` over the blocks so far,
        with the token weights `batch["weights"]`.
        """
        c, angles = self.config, self.angles(length)

        def run(weights: Any, x: Any, batch: Any, key: jax.Array | None) -> Any:
            stream, sums = self.split_sums(x)
            block, ids = DecoderBlock(c, weights), batch.get("segment_ids")
            stream, block_sums = block(stream, angles, ids, key, batch.get("weights"))
            return (stream, jax.tree.map(jnp.add, sums, block_sums)) if c.experts else stream

        return run

    def angles(self, length: int) -> tuple[Rotation, ...]:
        """Returns the angles of positions 0 to `length`, as `block` takes them."""
        c = self.config
        kinds = (False, True) if c.mixes_layers and c.local_rope_theta else (c.all_local,)
        return () if c.positions else tuple(rope_angles(c, length, local) for local in kinds)

    def split_sums(self, x: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Splits the output of a layer into stream and sums; without experts the sums are {}."""
        return (x, {}) if self.config.experts is None else x

    def hidden(self, outer: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
        """Applies the last norm to the stream after the last block."""
        hidden = DecoderBlock(self.config, outer).norm("norm", x)
        return constrain(hidden, *WORK, source=STREAM, into=("vocab",))

    @staticmethod
    def output_table(outer: Mapping[str, jax.Array]) -> jax.Array:
        """Returns [embed, vocab]: the head, or the transposed embedding if it is tied."""
        return use_param(outer["head"], "embed", "vocab") if "head" in outer else _table(outer).T

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns f32[..., vocab] for any part of the result of `__call__`, [..., embed].

        Sampling only needs the last position: `model.logits(hidden[:, -1])`. Columns of
        `config.vocab_padding` are -1e30.
        """
        product = matmul(hidden, self.output_table(self.outer_params()), jnp.float32)
        return self.logit_rule.apply(product)

    @property
    def logit_rule(self) -> LogitRule:
        """What becomes of the product of hidden states and output table."""
        c = self.config
        return LogitRule(c.logit_softcap, c.vocab if c.vocab_padding else None)


def _table(outer: Mapping[str, jax.Array]) -> jax.Array:
    return use_param(outer["embedding"], "vocab", "embed")


def _look_up(table: jax.Array, inputs: jax.Array) -> jax.Array:
    """Returns the rows of the tokens; inside `shard_map` those of other shards' tokens are 0."""
    rows = table.shape[0]
    start = shard_offset("vocab", rows)
    if isinstance(start, int):
        return jnp.take(table, inputs, axis=0)
    local = inputs - start
    inside = (local >= 0) & (local < rows)
    values = jnp.take(table, jnp.clip(local, 0, rows - 1), axis=0)
    return jnp.where(inside[..., None], values, 0)


def parameter_count(config: DecoderConfig) -> int:
    """Returns the number of parameters of a decoder, without building it.

    >>> parameter_count(DecoderConfig(vocab=16, embed_dim=8, num_layers=2, num_heads=2, mlp_dim=16))
    1576
    """
    abstract = jax.eval_shape(lambda: nnx.state(Decoder(config, nnx.Rngs(0)), nnx.Param))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract))
