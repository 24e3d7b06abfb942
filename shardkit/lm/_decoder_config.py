"""`DecoderConfig`: the sizes and options of a decoder, checked when they are declared."""

import dataclasses

from .._core.errors import ConfigError, Problem, did_you_mean, raise_all
from .._core.options import check_options, matches_annotation, option_problems

ATTENTIONS = ("auto", "blocked", "xla", "cudnn", "splash")
_COUNTS = ("vocab", "embed_dim", "num_layers", "num_heads", "mlp_dim", "loss_chunks", "top_k")
_OPTIONAL = ("kv_heads", "head_dim", "experts", "expert_mlp")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A Llama-family decoder: RMSNorm, rotary embedding, grouped queries, SwiGLU.

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
      bias: whether every product but the output head adds a bias.
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
    bias: bool = False
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
    if c.head_size % 2:
        why = f"rotary embedding turns pairs, so head_dim must be even (embed_dim={c.embed_dim})"
        fix = f"head_dim={c.head_size + 1}"
        rows.append(Problem(f"head_dim={c.head_size}", why, fix))
    if c.num_heads % c.key_heads:
        near = _nearest_divisor(c.num_heads, c.key_heads)
        why = f"does not divide num_heads={c.num_heads}"
        rows.append(Problem(f"kv_heads={c.key_heads}", why, f"kv_heads={near}"))
    if c.vocab % c.loss_chunks:
        near = _nearest_divisor(c.vocab, c.loss_chunks)
        why = f"does not divide vocab={c.vocab}"
        rows.append(Problem(f"loss_chunks={c.loss_chunks}", why, f"loss_chunks={near}"))
    if not 0 <= c.dropout < 1:
        why = "must be at least 0 and below 1"
        rows.append(Problem(f"dropout={c.dropout}", why, "dropout=0.1"))
    if c.attention not in ATTENTIONS:
        why = f"is unknown; known: {', '.join(ATTENTIONS)}."
        why += did_you_mean(str(c.attention), ATTENTIONS)
        rows.append(Problem(f"attention={c.attention!r}", why, 'attention="auto"'))
    return rows + _expert_problems(c)


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
    if c.experts is None:
        defaults = {"capacity_factor": None, "shared_experts": 0, "expert_mlp": None}
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
