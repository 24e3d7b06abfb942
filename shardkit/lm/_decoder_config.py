"""`DecoderConfig`: the sizes and options of a decoder, checked when they are declared."""

import dataclasses
import math
from typing import Literal

from .._core.errors import ConfigError, Problem, did_you_mean, raise_all
from .._core.options import check_options, matches_annotation, option_problems

ATTENTIONS = ("auto", "blocked", "xla", "cudnn", "splash")
_COUNTS = ("vocab", "embed_dim", "num_layers", "num_heads", "mlp_dim", "loss_chunks", "top_k")
_OPTIONAL = ("kv_heads", "head_dim", "experts", "expert_mlp", "positions", "window")
PRODUCTS = ("query", "key", "value", "out", "gate", "up", "down")
"""The products of a block, except those of chosen experts."""

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder; by default RMSNorm, rotary embedding, grouped queries and SwiGLU, as in Llama.

    With `experts` the feed-forward branch of every block is a mixture of experts.

    Attributes:
      vocab: number of tokens.
      embed_dim: width of the residual stream.
      num_layers: number of blocks; they are stacked and scanned, so compile time does not grow.
      num_heads: query heads.
      mlp_dim: width inside the feed-forward branch.
      kv_heads: key and value heads, a divisor of `num_heads`; None for `num_heads`.
      head_dim: width of one head, even; None for `embed_dim // num_heads`.
      tie_embeddings: whether the output head is the embedding table.
      bias: whether every product but the output head adds a bias; or the names of those that do,
        of `query key value out gate up down`.
      rope_theta: base of the rotary frequencies.
      norm_eps: added to the mean square inside every norm.
      dropout: fraction of each branch's output that is dropped in training.
      z_loss: weight of `logsumexp(logits) ** 2`, which keeps logits from drifting.
      loss_chunks: parts of the vocabulary whose logits are in memory one after another. 1 keeps
        all logits, which saves one of the head's four products; more needs less memory.
      attention: `"auto"` is cuDNN on CUDA for 16-bit types and `"blocked"` elsewhere; for the
        others see `sk.nn.attention`; `"splash"` runs on TPUs only.
      experts: number of experts that each token chooses from; None for one dense branch.
      top_k: number of experts that each token chooses.
      capacity_factor: an expert processes this many times its even share of the choices of a
        row; choices of later tokens are dropped. None is dropless: every choice is processed.
      shared_experts: experts that every token goes through as well; one dense branch of
        `shared_experts` times the width.
      expert_mlp: width inside one expert; None for `mlp_dim`.
      balance_loss: weight of each block's load-balancing loss, in training only.
      router_z_loss: weight of each block's `logsumexp(router logits) ** 2`, in training only.
      normalize_shares: whether the shares of a token's experts are scaled to sum to 1.
      norm: `"rms"`, or `"layer"` for LayerNorm with a bias.
      norm_offset: added to the scale of every norm; 1.0 for models that store `scale - 1`.
      qk_norm: whether queries and keys are normed per head before rotation.
      post_norms: whether the output of each branch is normed before it is added to the stream.
      activation: of the feed-forward branch; `"gelu_tanh"` is GELU approximated by tanh.
      gated: whether the branch multiplies the activation with a second product.
      embed_scale: factor of the token embeddings before the first block.
      positions: rows of a learned table that is added to the embeddings, the longest length;
        None for rotary embedding.
      query_scale: factor of the attention logits; None for `head_dim ** -0.5`.
      attn_softcap: attention logits become `c · tanh(logits / c)`; None leaves them.
      logit_softcap: the same for the logits of tokens.
      window: number of keys that a query sees, its own the last; None for all before it.
      global_layers: numbers of the layers, from 0, whose queries see all keys despite `window`.
      local_rope_theta: `rope_theta` of the other layers, which `rope_factor` leaves alone; None
        for the same in all layers.
      rope_factor: rotary frequencies are divided by it, so that a longer text turns as far.
      rope_bands: `(low, high, length)` of Llama 3.1: `rope_factor` applies to frequencies that
        turn less than `low` times in `length` positions, not to those that turn more than `high`
        times, and partly in between; None for all alike.
      vocab_padding: rows added to the tables so that a mesh axis divides them; no token, and their
        logits are -1e30.

    Raises:
      ConfigError: sizes do not fit together; all of them in one message.

    >>> config = DecoderConfig(
    ...     vocab=256, embed_dim=64, num_layers=2, num_heads=4, mlp_dim=176, kv_heads=2
    ... )
    >>> config.head_size, config.group
    (16, 2)
    """

    vocab: int
    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    kv_heads: int | None = None
    head_dim: int | None = None
    tie_embeddings: bool = False
    bias: bool | tuple[str, ...] = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    dropout: float = 0.0
    z_loss: float = 0.0
    loss_chunks: int = 1
    attention: str = "auto"
    experts: int | None = None
    top_k: int = 2
    capacity_factor: float | None = None
    shared_experts: int = 0
    expert_mlp: int | None = None
    balance_loss: float = 0.01
    router_z_loss: float = 0.001
    normalize_shares: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    qk_norm: bool = False
    post_norms: bool = False
    activation: Activation = "silu"
    gated: bool = True
    embed_scale: float = 1.0
    positions: int | None = None
    query_scale: float | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    window: int | None = None
    global_layers: tuple[int, ...] = ()
    local_rope_theta: float | None = None
    rope_factor: float = 1.0
    rope_bands: tuple[float, float, int] | None = None
    vocab_padding: int = 0

    def __post_init__(self) -> None:
        headline = "DecoderConfig does not describe a decoder."
        raise_all(ConfigError, headline, _count_problems(self))
        check_options(self, ConfigError, headline, "model.")
        raise_all(ConfigError, headline, _fit_problems(self))

    @property
    def key_heads(self) -> int:
        """Number of key and value heads: `kv_heads`, or `num_heads` if that is None."""
        return self.num_heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        """Width of one head: `head_dim`, or `embed_dim // num_heads` if that is None."""
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def group(self) -> int:
        """Number of query heads that share one key and value head."""
        return self.num_heads // self.key_heads

    @property
    def table_rows(self) -> int:
        """Rows of the embedding table: `vocab` and its padding."""
        return self.vocab + self.vocab_padding

    @property
    def biased(self) -> tuple[str, ...]:
        """Names of the products that add a bias."""
        return (PRODUCTS if self.bias else ()) if isinstance(self.bias, bool) else self.bias

    @property
    def mixes_layers(self) -> bool:
        """Whether some layers see a window and others every key before."""
        return self.window is not None and 0 < len(self.global_layers) < self.num_layers

    @property
    def all_local(self) -> bool:
        """Whether every layer sees a window."""
        return self.window is not None and not self.global_layers

    @property
    def expert_width(self) -> int:
        """Width inside one expert: `expert_mlp`, or `mlp_dim` if that is None."""
        return self.mlp_dim if self.expert_mlp is None else self.expert_mlp

    @property
    def dense_width(self) -> int:
        """Width of the branch that every token goes through; 0 if there is none."""
        return self.mlp_dim if self.experts is None else self.shared_experts * self.expert_width


def _count_problems(c: DecoderConfig) -> list[Problem]:
    """Sizes that are not integers of at least 1; the other checks divide by them."""
    sizes = {name: getattr(c, name) for name in (*_COUNTS, *_OPTIONAL)}
    given = {n: size for n, size in sizes.items() if n in _COUNTS or size is not None}
    wrong = {n: (size, int) for n, size in given.items() if not matches_annotation(int, size)}
    return option_problems("model.", **wrong) + [
        Problem(f"{name}={size}", "must be at least 1", f"{name}=1")
        for name, size in given.items()
        if name not in wrong and size < 1
    ]


def _fit_problems(c: DecoderConfig) -> list[Problem]:
    rows = []
    if c.head_dim is None and c.embed_dim % c.num_heads:
        why = f"embed_dim={c.embed_dim} is not divisible by num_heads={c.num_heads}, "
        why += "and head_dim is None"
        near = _nearest_divisor(c.embed_dim, c.num_heads)
        rows.append(Problem(f"num_heads={c.num_heads}", why, f"num_heads={near}, or head_dim=64"))
    if c.head_size % 2 and c.positions is None:
        why = f"rotary embedding turns pairs, so head_dim must be even (embed_dim={c.embed_dim})"
        fix = f"head_dim={c.head_size + 1}"
        rows.append(Problem(f"head_dim={c.head_size}", why, fix))
    if c.num_heads % c.key_heads:
        near = _nearest_divisor(c.num_heads, c.key_heads)
        why = f"does not divide num_heads={c.num_heads}"
        rows.append(Problem(f"kv_heads={c.key_heads}", why, f"kv_heads={near}"))
    if c.table_rows % c.loss_chunks:
        near = _nearest_divisor(c.table_rows, c.loss_chunks)
        why = f"does not divide vocab={c.vocab}"
        why += f" + vocab_padding={c.vocab_padding}" if c.vocab_padding else ""
        rows.append(Problem(f"loss_chunks={c.loss_chunks}", why, f"loss_chunks={near}"))
    if not 0 <= c.dropout < 1:
        why = "must be at least 0 and below 1"
        rows.append(Problem(f"dropout={c.dropout}", why, "dropout=0.1"))
    if c.attention not in ATTENTIONS:
        why = f"is unknown; known: {', '.join(ATTENTIONS)}."
        why += did_you_mean(str(c.attention), ATTENTIONS)
        rows.append(Problem(f"attention={c.attention!r}", why, 'attention="auto"'))
    return rows + _variant_problems(c) + _expert_problems(c)


def _variant_problems(c: DecoderConfig) -> list[Problem]:
    """What is wrong with the options in which model families differ."""
    rows = [
        Problem(f"{name}={getattr(c, name)}", "must be positive", f"{name}=None")
        for name in ("query_scale", "attn_softcap", "logit_softcap", "local_rope_theta")
        if (value := getattr(c, name)) is not None and not value > 0
    ]
    rows += [
        Problem(f"bias={c.bias}", f"has no product {name!r}.{did_you_mean(name, PRODUCTS)}")
        for name in c.biased
        if name not in PRODUCTS
    ]
    if c.vocab_padding < 0:
        why = "rows of a table cannot be taken away"
        rows.append(Problem(f"vocab_padding={c.vocab_padding}", why, "vocab_padding=0"))
    rows += [
        Problem(f"{name}={getattr(c, name)}", "must be positive and finite", f"{name}={usual}")
        for name, usual in (("rope_theta", 10_000.0), ("rope_factor", 1.0))
        if not 0 < getattr(c, name) < math.inf
    ]
    if not 0 <= c.norm_eps < math.inf:
        why = "must be at least 0 and finite"
        rows.append(Problem(f"norm_eps={c.norm_eps}", why, "norm_eps=1e-5"))
    if c.rope_bands is not None and not 0 < c.rope_bands[0] < c.rope_bands[1]:
        why = "low must be positive and below high"
        fix = "rope_bands=(1.0, 4.0, 8192)"
        rows.append(Problem(f"rope_bands={c.rope_bands}", why, fix))
    numbers = sorted(set(c.global_layers))
    if c.global_layers and (numbers[0] < 0 or numbers[-1] >= c.num_layers):
        why = f"the layers are 0 to {c.num_layers - 1}"
        rows.append(Problem(f"global_layers={c.global_layers}", why, "global_layers=(0,)"))
    local = {"global_layers": (), "local_rope_theta": None}
    if c.window is None:
        rows += [
            Problem(f"{name}={getattr(c, name)}", "no layer has a window", "window=1024")
            for name, default in local.items()
            if getattr(c, name) != default
        ]
    return rows


def _expert_problems(c: DecoderConfig) -> list[Problem]:
    rows = []
    if c.shared_experts < 0:
        why = "must be at least 0"
        rows.append(Problem(f"shared_experts={c.shared_experts}", why, "shared_experts=0"))
    if c.capacity_factor is not None and not c.capacity_factor > 0:
        why = "an expert would take no token; None drops none"
        fix = "capacity_factor=1.25, or None"
        rows.append(Problem(f"capacity_factor={c.capacity_factor}", why, fix))
    if c.experts is not None and c.top_k > c.experts:
        why = f"a token cannot choose more than experts={c.experts}"
        rows.append(Problem(f"top_k={c.top_k}", why, f"top_k={c.experts}"))
    if c.experts is not None and (c.activation != "silu" or not c.gated):
        why = "experts compute SwiGLU"
        subject = f"activation={c.activation!r}, gated={c.gated}"
        rows.append(Problem(subject, why, 'activation="silu", gated=True'))
    if c.experts is None:
        defaults = {"capacity_factor": None, "shared_experts": 0, "expert_mlp": None}
        defaults |= {"normalize_shares": True}
        rows += [
            Problem(f"{name}={getattr(c, name)}", "the decoder has no experts", "experts=8")
            for name, default in defaults.items()
            if getattr(c, name) != default
        ]
    return rows


def _nearest_divisor(size: int, wish: int) -> int:
    """Returns the divisor of `size` nearest to `wish`; of two the smaller."""
    divisors = (d for d in range(1, size + 1) if size % d == 0)
    return min(divisors, key=lambda d: (abs(d - wish), d))
