"""The reference decoder in torch, as one would write it there; needs the CPU build of torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from shardkit.lm import DecoderConfig

Weights = dict[str, torch.Tensor]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [batch, heads, length, head_dim]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Decoder(torch.nn.Module):
    """Weights by the names that the plain JAX decoder has, each layer's in lists."""

    def __init__(self, config: DecoderConfig, weights: Any):
        super().__init__()
        self.config = config

        def own(x: Any) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.from_numpy(np.array(x)))

        def flat(name: str, x: Any) -> Any:
            width = config.num_heads * config.head_size
            shapes = {"out": (width, config.embed_dim)}
            shapes |= dict.fromkeys(("query", "key", "value"), (config.embed_dim, width))
            return np.asarray(x).reshape(shapes.get(name, x.shape))

        self.layers = torch.nn.ModuleList(
            torch.nn.ParameterDict(
                {name: own(flat(name, x[i])) for name, x in weights["layers"].items()}
            )
            for i in range(config.num_layers)
        )
        self.embedding, self.head = own(weights["embedding"]), own(weights["head"])
        self.norm = own(weights["norm"])
        half = config.head_size // 2
        frequency = config.rope_theta ** (-torch.arange(half) / half)
        angle = torch.arange(256)[:, None] * frequency
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy."""
        c = self.config
        x = F.embedding(inputs, self.embedding)
        rows, length, _ = x.shape
        cos, sin = self.cos[:length], self.sin[:length]
        for w in self.layers:
            h = F.rms_norm(x, (c.embed_dim,), w["attn_norm"], c.norm_eps)
            q, k, v = (
                (h @ w[name]).view(rows, length, c.num_heads, c.head_size).transpose(1, 2)
                for name in ("query", "key", "value")
            )
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + mixed.transpose(1, 2).reshape(rows, length, -1) @ w["out"]
            h = F.rms_norm(x, (c.embed_dim,), w["mlp_norm"], c.norm_eps)
            x = x + (F.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
        logits = F.rms_norm(x, (c.embed_dim,), self.norm, c.norm_eps) @ self.head
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def training(
    config: DecoderConfig, weights: Any, batch: Any, compiled: bool
) -> Callable[[], float]:
    """Returns a function that runs one AdamW step and returns its loss."""
    model = Decoder(config, weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    call = torch.compile(model) if compiled else model
    inputs, targets = (torch.from_numpy(batch[n]).long() for n in ("inputs", "targets"))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = call(inputs, targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
