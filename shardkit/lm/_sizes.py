"""Named sizes of the decoder, from one that a test can train to published ones."""

from ._decoder_config import DecoderConfig

SIZES: dict[str, DecoderConfig] = {
    # Byte-level, for tests and first runs on a CPU.
    "nano": DecoderConfig(
        vocab=256, embed_dim=64, num_layers=2, num_heads=4, mlp_dim=192, kv_heads=2
    ),
    "micro": DecoderConfig(vocab=256, embed_dim=128, num_layers=4, num_heads=4, mlp_dim=384),
    "nano-moe": DecoderConfig(
        vocab=256,
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        mlp_dim=96,
        kv_heads=2,
        experts=8,
        capacity_factor=1.25,
    ),
    # What benchmarks/cpu_decoder.py measures: 7.4 M parameters.
    "tiny": DecoderConfig(vocab=8192, embed_dim=256, num_layers=4, num_heads=8, mlp_dim=688),
    "small": DecoderConfig(vocab=32_000, embed_dim=768, num_layers=12, num_heads=12, mlp_dim=2048),
    "medium": DecoderConfig(
        vocab=32_000, embed_dim=1024, num_layers=24, num_heads=16, mlp_dim=2816
    ),
    # arXiv:2307.09288 and its released params.json: 6,738,415,616 parameters.
    "llama2-7b": DecoderConfig(
        vocab=32_000, embed_dim=4096, num_layers=32, num_heads=32, mlp_dim=11_008, loss_chunks=8
    ),
    # arXiv:2407.21783, table 3, and its released params.json: 8,030,261,248 parameters.
    "llama3-8b": DecoderConfig(
        vocab=128_256,
        embed_dim=4096,
        num_layers=32,
        num_heads=32,
        kv_heads=8,
        mlp_dim=14_336,
        rope_theta=500_000.0,
        loss_chunks=8,
    ),
    # arXiv:2401.04088, table 1, and its released params.json: 46,702,792,704 parameters, of
    # which 2 of 8 experts serve a token.
    "mixtral-8x7b": DecoderConfig(
        vocab=32_000,
        embed_dim=4096,
        num_layers=32,
        num_heads=32,
        kv_heads=8,
        mlp_dim=14_336,
        rope_theta=1_000_000.0,
        loss_chunks=8,
        experts=8,
        top_k=2,
    ),
}
