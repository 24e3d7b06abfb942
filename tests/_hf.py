"""Golden models of Hugging Face families, and the step that trains one of them."""

import json
import math
import struct
from pathlib import Path

import jax
import numpy as np
import optax

import shardkit as sk
from shardkit.lm import decoder_model

ROOT = Path(__file__).parent / "data" / "hf"
FAMILIES = sorted(path.name for path in ROOT.iterdir())
ONE = {"fsdp": 1}
EIGHT = {"data": 2, "fsdp": 2, "tensor": 2}


def make_mesh(sizes):
    return sk.MeshSpec(**sizes).build(devices=jax.devices()[: math.prod(sizes.values())])


def golden(family):
    return np.load(ROOT / family / "golden.npz")


def make_batch(tokens):
    """Next-token targets; the last position of a row has none."""
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0
    return {"inputs": tokens, "targets": np.roll(tokens, -1, 1), "weights": weights}


def make_spec(config, sizes=ONE, rows=4, **options):
    s = sk.strategies
    ready = {"data": s.data, "fsdp": s.fsdp, "tensor": s.tensor}
    first, *more = (ready[axis]() for axis in sizes)
    for strategy in more:
        first = first | strategy
    model = decoder_model(config)
    return sk.StepSpec(
        loss_fn=model.loss_fn,
        init=model.init,
        optimizer=optax.sgd(1.0),
        batch=make_batch(np.zeros((rows, 16), np.int32)),
        strategy=first,
        **options,
    )


def load(folder, sizes=ONE, config=None, **options):
    spec = make_spec(config or sk.hf.decoder_config(folder), sizes)
    return sk.hf.load(folder, spec, make_mesh(sizes), **options)


def logits(config, params, tokens):
    def run(params):
        model = decoder_model(config).bind(params)
        return model.logits(model(tokens))

    return np.asarray(jax.jit(run)(params))


def bits(folder):
    """`{name: bytes}` of the files of a folder, without the golden results."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".npz"}


def write_tensors(path, tensors):
    """A safetensors file of numpy arrays, written by hand."""
    codes = {"float32": "F32", "float16": "F16", "int32": "I32"}
    header, data = {}, b""
    for name, x in tensors.items():
        start, data = len(data), data + x.tobytes()
        header[name] = {
            "dtype": codes[x.dtype.name],
            "shape": list(x.shape),
            "data_offsets": [start, len(data)],
        }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_tensors(folder):
    """`{name: array}` of all files of a folder, by the library."""
    from safetensors.numpy import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {name: x for file in files for name, x in load_file(file).items()}
