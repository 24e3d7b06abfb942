"""Why bounded experts drift apart on another mesh: the first choice that rounding turns.

python benchmarks/expert_tie.py [--steps 60]

One device and data × expert × tensor of eight simulated ones make the same updates, until they
first drop another number of tokens. The two states before that update then choose experts for the
same batch on one device, and every token on which they differ is listed.
"""

import argparse
import dataclasses
import functools
import math
import operator
from collections.abc import Mapping
from typing import Any
from unittest import mock

import _harness

FACTOR = 1.25
MESH = {"data": 2, "expert": 2, "tensor": 2}


def compiled(model: Any, batch: Any, sizes: Mapping[str, int]) -> Any:
    """The step of one mesh."""
    import jax
    import optax

    import shardkit as sk

    return sk.compile_step(
        model.loss_fn,
        optax.adamw(3e-3),
        init=model.init,
        batch=batch,
        mesh=sk.MeshSpec(**sizes).build(devices=jax.devices()[: math.prod(sizes.values())]),
        strategy=functools.reduce(operator.or_, (getattr(sk.strategies, one)() for one in sizes)),
    )


def choices(model: Any, params: Any, batch: Any) -> tuple[float, list[tuple[Any, Any]]]:
    """Loss on one device, and of each layer the probabilities and the chosen experts."""
    import jax
    import numpy as np

    from shardkit.nn import _experts

    seen, route = [], _experts.route

    def watched(logits: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
        choice, share = route(logits, top_k)
        seen.append((np.asarray(jax.nn.softmax(logits)), np.asarray(choice)))
        return choice, share

    with mock.patch.object(_experts, "route", watched), jax.disable_jit():
        loss, _ = model.loss_fn(params, batch, jax.random.key(0))
    return float(loss.total / loss.weight), seen


def dropped(config: Any, choice: Any) -> Any:
    """Which choices find their expert full, bool[batch, length, k]."""
    from shardkit.lm._mixture import expert_capacity
    from shardkit.nn._expert_dispatch import position_in_expert

    rows, length, _ = choice.shape
    place = position_in_expert(choice.reshape(rows, -1), config.experts).reshape(choice.shape)
    return place >= expert_capacity(config, length)


def apart(config: Any, mine: Any, other: Any) -> list[dict[str, Any]]:
    """Every token that is routed or dropped otherwise, in order of layers and places."""
    import numpy as np

    rows = []
    for layer, ((p, choice), (q, turned)) in enumerate(zip(mine, other, strict=True)):
        lost, lost_too = (np.asarray(dropped(config, one)) for one in (choice, turned))
        differ = ((choice != turned) | (lost != lost_too)).any(-1)
        for row, place in np.argwhere(differ):
            best = np.sort(p[row, place])[::-1]
            k = choice.shape[-1]
            rows.append(
                {
                    "layer": layer,
                    "row": int(row),
                    "token": int(place),
                    "experts on one device": choice[row, place].tolist(),
                    "experts on the mesh": turned[row, place].tolist(),
                    "dropped on one device": lost[row, place].tolist(),
                    "dropped on the mesh": lost_too[row, place].tolist(),
                    "last chosen over first not chosen": f"{best[k - 1] - best[k]:.1e}",
                    "probabilities apart": f"{np.abs(p[row, place] - q[row, place]).max():.1e}",
                }
            )
    return rows


def main() -> None:
    """Makes the updates, finds the tokens and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    import jax

    import shardkit as sk
    from shardkit.data import DataConfig, load_text
    from shardkit.lm import SIZES, Decoder, decoder_loss

    sk.simulate_devices(math.prod(MESH.values()))
    text = load_text(DataConfig(seq_len=128, batch_size=8, validation_fraction=0.01))
    config = dataclasses.replace(SIZES["nano-moe"], capacity_factor=FACTOR)
    model = sk.from_nnx(lambda rngs: Decoder(config, rngs), decoder_loss)
    run = [compiled(model, text.batch(0), sizes) for sizes in ({"data": 1}, MESH)]
    states = [step.init(jax.random.key(0)) for step in run]
    most = 0.0
    for update in range(steps):
        batch, before = text.batch(update), [jax.device_get(one.params) for one in states]
        made = [step(state, batch) for step, state in zip(run, states, strict=True)]
        states = [state for state, _ in made]
        losses = [float(metrics["loss"]) for _, metrics in made]
        if len({float(metrics["dropped"]) for _, metrics in made}) > 1:
            break
        most = max(most, abs(losses[0] - losses[1]))
    else:
        raise SystemExit(f"{steps} updates drop the same numbers of tokens")
    (alone, mine), (same, other) = (choices(model, params, batch) for params in before)
    note = (
        f"nano-moe, capacity factor {FACTOR}. Updates 0 to {update - 1}: as many drops, losses "
        f"within {most:.1e}. Update {update}: losses {losses[0]:.6f} and {losses[1]:.6f}. One "
        f"device makes {alone:.6f} of its own weights and {same:.6f} of those of the mesh, which "
        "is the loss of the mesh: weights decide, not the mesh. Every token that the two sets of "
        "weights route or drop otherwise is below; the first is a tie up to rounding, what comes "
        "behind it in its row and in the next layer follows from it."
    )
    where = "1 and 8 simulated CPU devices"
    _harness.write("expert_tie", "measured", where, apart(config, mine, other), note)


if __name__ == "__main__":
    main()
