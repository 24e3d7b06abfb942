"""Named sizes of the decoder, from one that a test can train to published ones."""

from typing import Any

from ._decoder_config import DecoderConfig


def _size(vocab: int, embed: int, layers: int, heads: int, mlp: int, **more: Any) -> DecoderConfig:
    sizes = {"embed_dim": embed, "num_layers": layers, "num_heads": heads, "mlp_dim": mlp}
    return DecoderConfig(vocab=vocab, **sizes, **more)


SIZES: dict[str, DecoderConfig] = {
    # Byte-level, for tests and first runs on a CPU.
    "nano": _size(256, 64, 2, 4, 192, kv_heads=2),
    "micro": _size(256, 128, 4, 4, 384),
    "nano-moe": _size(256, 64, 2, 4, 96, kv_heads=2, experts=8, capacity_factor=1.25),
    # What benchmarks/cpu_decoder.py measures: 7.4 M parameters.
    "tiny": _size(8192, 256, 4, 8, 688),
    "small": _size(32_000, 768, 12, 12, 2048),
    "medium": _size(32_000, 1024, 24, 16, 2816),
    # arXiv:2307.09288 and its released params.json: 6,738,415,616 parameters.
    "llama2-7b": _size(32_000, 4096, 32, 32, 11_008, loss_chunks=8),
    # arXiv:2407.21783, table 3, and its released params.json: 8,030,261,248 parameters.
    "llama3-8b": _size(
        128_256, 4096, 32, 32, 14_336, kv_heads=8, rope_theta=500_000.0, loss_chunks=8
    ),
    # arXiv:2401.04088, table 1, and its released params.json: 46,702,792,704 parameters, of
    # which 2 of 8 experts serve a token.
    "mixtral-8x7b": _size(
        *(32_000, 4096, 32, 32, 14_336),
        **{"kv_heads": 8, "rope_theta": 1_000_000.0, "loss_chunks": 8, "experts": 8, "top_k": 2},
    ),
}
