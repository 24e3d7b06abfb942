"""A fine-tune of a Llama, or of any other family in docs/hugging_face.md, with low-rank adapters.

    shardkit train configs/finetune_llama.py --set model.weights=HF_DIR --set data.path=chats.jsonl

HF_DIR is a folder with `config.json`, safetensors and `tokenizer.json`; each line of the data is
`{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}`,
`{"prompt": "…", "completion": "…"}` or `{"text": "…"}`. The answers alone count in the loss. Add
`--set train.export=DIR` for a folder that `transformers` loads, `--set lora.rank=none` to train all
weights, and `--set devices=local` on a machine with accelerators.
"""

import dataclasses

from shardkit.config import Config, OptimizerConfig, PretrainedDecoder
from shardkit.data import DataConfig
from shardkit.lm import LoraConfig, TextTrainConfig
from shardkit.mesh import MeshSpec
from shardkit.parallel import strategies


def config() -> Config:
    """Returns 100 updates of adapters of rank 8, with fsdp=8 and rows of 1024 tokens."""
    return Config(
        name="finetune_llama",
        model=PretrainedDecoder(),
        lora=LoraConfig(rank=8, alpha=16),
        data=DataConfig(format="json_lines", packing=True, seq_len=1024, batch_size=8),
        mesh=MeshSpec(fsdp=-1),
        strategy=dataclasses.replace(strategies.fsdp(), remat="full"),
        optimizer=OptimizerConfig(name="adamw", lr=2e-4, weight_decay=0.0),
        train=TextTrainConfig(steps=100, eval_every=25, sample=64),
    )
