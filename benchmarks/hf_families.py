"""Every Hugging Face family against `transformers` itself, there and back, on 8 simulated devices.

    python benchmarks/hf_families.py

needs torch and transformers, as does `benchmarks/_hf_models.py`, which makes the models. For each
family: logits and gradients against torch, the exported folder against the one that was loaded,
and what `transformers` computes from the exported folder, before and after an update.
"""

import importlib.metadata
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

jax.config.update("jax_num_cpu_devices", 8)

import _harness  # noqa: E402
import _hf_models  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

import shardkit as sk  # noqa: E402
from shardkit.lm import decoder_model  # noqa: E402

NOTE = (
    "Tiny models, f32. Errors are largest differences: of logits absolute, of gradients relative "
    "to each tensor's largest. Equal means bit for bit. fsdp=2 x tensor=2 x data=2."
)


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns all tensors of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: x for file in files for name, x in load_file(file).items()}


def torch_logits(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    """Returns what `transformers` computes from a folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64)), use_cache=False).logits.numpy()


def measure(family: str, root: pathlib.Path) -> dict[str, Any]:
    """Returns one row of the result."""
    folder = root / family
    want = np.load(folder / "golden.npz")
    tokens, config = want["tokens"], sk.hf.decoder_config(folder)
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0
    batch = {"inputs": tokens, "targets": np.roll(tokens, -1, 1), "weights": weights}
    model, s = decoder_model(config), sk.strategies
    spec = sk.StepSpec(
        loss_fn=model.loss_fn,
        init=model.init,
        optimizer=optax.sgd(0.1),
        batch=batch,
        strategy=s.data() | s.fsdp() | s.tensor(),
    )
    mesh = sk.MeshSpec(data=2, fsdp=2, tensor=2).build()

    @jax.jit
    def logits(params: Any) -> jax.Array:
        bound = model.bind(params)
        return bound.logits(bound(jnp.asarray(tokens)))

    params = sk.hf.load(folder, spec, mesh)
    step = spec.compile(mesh)
    state = step.init(jax.random.key(0), params=params)
    _, gradients = step.gradients(state, batch)
    out = root / f"{family}-out"
    sk.hf.save(out / "same", params, like=folder)
    sk.hf.save(out / "gradients", gradients, like=folder)
    state, _ = step(state, batch)
    sk.hf.save(out / "tuned", state.params, like=folder)
    ours, theirs = read(out / "same"), read(folder)
    grads = read(out / "gradients")
    names = [name for name in want.files if name.startswith("gradient ")]
    errors = [
        np.abs(grads[name.removeprefix("gradient ")] - want[name]).max() / np.abs(want[name]).max()
        for name in names
    ]
    tuned = np.abs(torch_logits(out / "tuned", tokens) - np.asarray(logits(state.params))).max()
    return {
        "family": family,
        "logits": f"{np.abs(np.asarray(logits(params)) - want['logits']).max():.1e}",
        "gradients": f"{max(errors):.1e}",
        "of tensors": len(names),
        "tensors equal": ours.keys() == theirs.keys()
        and all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs),
        "config equal": (out / "same" / "config.json").read_bytes()
        == (folder / "config.json").read_bytes(),
        "reloaded equal": np.array_equal(
            torch_logits(out / "same", tokens), torch_logits(folder, tokens)
        ),
        "logits after an update": f"{tuned:.1e}",
    }


def main() -> None:
    """Measures every family, and writes the result."""
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        _hf_models.main(root)
        rows = [measure(family, root) for family in _hf_models.FAMILIES]
    note = f"{NOTE} transformers {importlib.metadata.version('transformers')}."
    print(_harness.write("hf_families", "measured", "8 simulated CPU devices", rows, note))


if __name__ == "__main__":
    main()
