"""What would change a plan's answer, and the plan as a picture."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import optax
import pytest

import shardkit as sk
from shardkit.cli import main
from shardkit.mesh import Target
from shardkit.planner import Plan, SearchSpace, plan
from shardkit.planner._search import Search
from shardkit.planner._sensitivity import (
    _find_crossover,
    describe_batch_crossover,
    describe_more_memory,
)
from shardkit.planner._space import make_strategy

TARGET = "tpu:v5p:2x2x2"
SPACE = SearchSpace(accumulate=(1,), remat=("none",))


def model(rows: int, length: int = 4) -> sk.StepSpec:
    """A product whose rows have a length that it names."""

    def loss(w: jax.Array, batch: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.mean(sk.nn.constrain(jnp.tanh(batch @ w), "batch", "length", "embed") ** 2)

    batch = jax.ShapeDtypeStruct((rows, length, 512), "float32")
    init = lambda key: sk.WithAxes(jnp.zeros((512, 512)), (None, "embed"))  # noqa: E731
    return sk.StepSpec(
        loss_fn=loss,
        optimizer=optax.sgd(1e-3),
        init=init,
        batch=batch,
        strategy=make_strategy({"data": 2}),
    )


@pytest.fixture(scope="module")
def waiting() -> Plan:
    """A plan whose best layout waits for its links."""
    return plan(model(16), TARGET, space=dataclasses.replace(SPACE, axes=("data",)))


def test_a_plan_says_from_which_batch_on_links_are_waited_for(waiting: Plan) -> None:
    many = Search.of(model(2**16, 8), Target.parse(TARGET), SPACE, 0.0)
    best = min(many.run().candidates, key=lambda c: c.seconds)
    assert not best.communication_bound
    (text,) = describe_batch_crossover(many, best)
    assert text.startswith("batch per device below ")
    assert "becomes communication-bound, now " in text
    assert " tokens): " in text
    scale = _find_crossover(many, best, 2.0**-12)
    assert many.estimate_again(best, scale).communication_bound
    assert not many.estimate_again(best, 1.01 * scale).communication_bound
    assert many.estimate_again(best, 1.0) == best
    (text,) = waiting.changes
    assert "above" in text
    assert "stops being communication-bound" in text


def test_faster_layouts_say_what_memory_they_lack(waiting: Plan) -> None:
    best = waiting.best
    near, fast = (
        dataclasses.replace(best, seconds=best.seconds * share, capacity=int(best.total) - lack)
        for share, lack in ((0.9, 2**20), (0.5, 2**30))
    )
    texts = describe_more_memory(best, [fast, near])
    assert [text.split(":")[0] for text in texts] == [
        "with 1.00 MiB more memory",
        "with 1.00 GiB more memory",
    ]
    assert len(describe_more_memory(best, [near])) == 1
    assert describe_more_memory(near, [best]) == ()


def test_other_lengths_are_weighed_beside_rows_and_links(waiting: Plan) -> None:
    found = {what: seconds for what, _, seconds in waiting.sensitivity}
    of = ("rows", "length", "link bandwidth")
    assert set(found) == {f"{factor} x {what}" for factor in ("0.5", "2") for what in of}
    # Rows and lengths are both tokens here.
    assert found["2 x length"] == pytest.approx(found["2 x rows"])
    assert found["2 x length"] > waiting.best.seconds > found["2 x link bandwidth"]


def test_memory_against_time_is_drawn(waiting: Plan, tmp_path) -> None:
    assert waiting.plot(tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    text = waiting.plot(tmp_path / "front.svg").read_text()
    # Letters are drawn as paths, each word with itself as a comment beside them.
    assert "Memory against time, modelled" in text
    assert "modelled, nothing was run" in text
    assert "capacity, 95 GiB" in text
    assert waiting.best.layout in text


def test_a_picture_is_refused_before_anything_is_searched(capsys, tmp_path, monkeypatch) -> None:
    out = tmp_path / "front.jpg"
    words = ["plan", "--target", "no:such:target", "--compile", "0", "--plot"]
    assert main([*words, str(out)]) == 2
    shown = capsys.readouterr().err
    assert f"The figure cannot be saved.\n  {out}  has the suffix '.jpg'" in shown
    assert f"Fix: --plot {out.with_suffix('.png')}" in shown
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([*words, str(tmp_path / "no" / "front.jpg")]) == 2
    shown = capsys.readouterr().err
    assert "there is no folder" in shown
    assert "pip install 'shardkit[plot]'" in shown
