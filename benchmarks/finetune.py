"""A fine-tune by its command, and what `transformers` computes from the folder that it leaves.

    python benchmarks/finetune.py [FAMILY ...]

needs torch and transformers. For each family the tiny model of the tests gets a tokenizer and sums
as chats; `shardkit train finetune_llama` trains adapters on 8 simulated devices (data=2 × fsdp=2 ×
tensor=2) and exports. Then logits of a prompt, and the likeliest tokens behind it from a cache on
each side, are compared; and the exported weights with base + alpha / rank · B A by hand.
"""

import argparse
import contextlib
import importlib.metadata
import json
import pathlib
import shutil
import tempfile
from typing import Any

import jax

jax.config.update("jax_num_cpu_devices", 8)

import _harness  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

import shardkit as sk  # noqa: E402
from shardkit.cli import main as command  # noqa: E402
from shardkit.lm import Generator, decoder_model  # noqa: E402

GOLDEN = pathlib.Path(__file__).parent.parent / "tests" / "data" / "hf"
PROMPT = "<|im_start|>user\n3+4=?<|im_end|>\n<|im_start|>assistant\n"
COUNT, STEPS = 16, 20
NOTE = (
    f"Tiny models, f32, {STEPS} updates of adapters of rank 4. Gaps are largest absolute "
    f"differences; tokens are the likeliest {COUNT} behind a prompt, transformers' own cache "
    "against shardkit's on data=2 x fsdp=2 x tensor=2."
)


def prepare(family: str) -> None:
    """Makes the folder `hf` with a tokenizer, and `chats.jsonl`."""
    shutil.copytree(GOLDEN / family, "hf", ignore=shutil.ignore_patterns("*.npz"))
    characters = {char: i for i, char in enumerate(sorted(set("0123456789+=? \nusertan")))}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save("hf/tokenizer.json")
    sums = [(a, b) for a in range(10) for b in range(10)]
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"{a}+{b}=?"},
                {"role": "assistant", "content": str(a + b)},
            ]
        }
        for a, b in sums
    ]
    pathlib.Path("chats.jsonl").write_text("\n".join(map(json.dumps, lines)))


def train() -> None:
    """Types the command."""
    settings = ["model.weights=hf", "data.path=chats.jsonl", "data.seq_len=48", "lora.rank=4"]
    settings += ["mesh=data=2,fsdp=2,tensor=2", "strategy=data|fsdp|tensor", "train.check=off"]
    settings += [f"train.steps={STEPS}", "train.eval_every=0", "train.sample=0"]
    settings += ["optimizer.lr=0.02", "train.export=out", "train.export_adapter=adapter"]
    words = (word for setting in settings for word in ("--set", setting))
    assert command(["train", "finetune_llama", *words]) == 0


def read(folder: str) -> dict[str, np.ndarray]:
    """Returns all tensors of a folder."""
    files = sorted(pathlib.Path(folder).glob("*.safetensors"))
    return {name: x for file in files for name, x in load_file(file).items()}


def merge_gap() -> float:
    """Returns the largest difference of the export from base and adapter, merged by hand."""
    base, out, adapter = read("hf"), read("out"), read("adapter")
    described = json.loads(pathlib.Path("adapter/adapter_config.json").read_text())
    scale, gaps = described["lora_alpha"] / described["r"], [0.0]
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{prefix}A.weight" in adapter:
            weight = weight + scale * adapter[f"{prefix}B.weight"] @ adapter[f"{prefix}A.weight"]
        gaps.append(float(np.abs(weight - out[name]).max()))
    return max(gaps)


def measure(family: str) -> dict[str, Any]:
    """Returns one row of the result."""
    prepare(family)
    train()
    ids = Tokenizer.from_file("out/tokenizer.json").encode(PROMPT).ids
    model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
        "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0].numpy()
        drawn = model.generate(torch.tensor([ids]), max_new_tokens=COUNT, do_sample=False)
    config, s = sk.hf.decoder_config("out"), sk.strategies
    decoder, strategy = decoder_model(config), s.data() | s.fsdp() | s.tensor()
    dtypes = {"inputs": np.int32, "targets": np.int32, "weights": np.float32}
    batch = {name: jax.ShapeDtypeStruct((8, 16), dtype) for name, dtype in dtypes.items()}
    spec = sk.StepSpec(
        loss_fn=decoder.loss_fn,
        init=decoder.init,
        optimizer=optax.identity(),
        batch=batch,
        strategy=strategy,
    )
    mesh = sk.MeshSpec(data=2, fsdp=2, tensor=2).build()
    params = sk.hf.load("out", spec, mesh)

    def logits(params: Any) -> jax.Array:
        bound = decoder.bind(params)
        return bound.logits(bound(np.array([ids], np.int32)))[0]

    found = np.asarray(jax.jit(logits)(params))
    [tokens] = Generator(config, mesh, strategy)(params, [ids], count=COUNT)
    moved = max(float(np.abs(x).max()) for name, x in read("adapter").items() if "lora_B" in name)
    return {
        "family": family,
        "logits gap": f"{np.abs(found - want).max():.1e}",
        "largest logit": f"{np.abs(want).max():.1f}",
        "tokens equal": tokens.tolist() == drawn[0, len(ids) :].tolist(),
        "merge gap": f"{merge_gap():.1e}",
        "largest of B": f"{moved:.1e}",
        "keys missing or extra": sum(len(keys) for keys in loaded.values()),
    }


def main() -> None:
    """Trains, exports and compares each family, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=["llama", "gemma2"])
    rows, names = [], ("torch", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    for family in parser.parse_args().families:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            rows.append(measure(family))
        print(rows[-1], flush=True)
        _harness.write("finetune", "measured", f"8 simulated CPU devices; {versions}", rows, NOTE)


if __name__ == "__main__":
    main()
