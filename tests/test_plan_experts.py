"""Experts over a mesh axis in a plan: what travels, what is split, what cannot be followed."""

import dataclasses

import optax
import pytest

import shardkit as sk
from shardkit.data import DataConfig
from shardkit.lm import DecoderConfig, declare_run
from shardkit.mesh import Target
from shardkit.planner import Candidate, SearchSpace, plan
from shardkit.planner._declared_step import estimate_step
from shardkit.planner._network import Network
from shardkit.planner._search import Search, SearchResult
from shardkit.planner._space import make_strategy

TARGET = "tpu:v5p:2x2x2"
ROWS, LENGTH = 16, 32
SIZES = DecoderConfig(
    vocab=256,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    mlp_dim=64,
    experts=4,
    expert_mlp=16,
    capacity_factor=1.0,
)
SPACE = SearchSpace(("data", "expert", "tensor"), accumulate=(1, 2), remat=("none",), zero=(0,))


def decoder(sizes: DecoderConfig = SIZES) -> sk.StepSpec:
    data = DataConfig(seq_len=LENGTH, batch_size=ROWS)
    return declare_run(sizes, data, make_strategy({"data": 2}), optax.adamw(1e-3))


def found_in(declared: sk.StepSpec, space: SearchSpace = SPACE) -> SearchResult:
    return Search.of(declared, Target.parse(TARGET), space, 0.0).run()


@pytest.fixture(scope="module")
def found() -> SearchResult:
    return found_in(decoder())


def on(found: SearchResult, **sizes: int) -> Candidate:
    return next(
        c
        for c in found.candidates
        if {axis: n for axis, n in c.mesh.items() if n > 1} == sizes
        and c.accumulate.micro_batches == 1
    )


def test_slots_travel_twice_forward_and_twice_backward(found: SearchResult):
    for sizes in ({"data": 2, "expert": 4}, {"data": 2, "expert": 2, "tensor": 2}):
        n, rows = sizes["expert"], ROWS // sizes["data"] // sizes["expert"]
        slots = rows * LENGTH * SIZES.top_k * SIZES.embed_dim * 4
        assert on(found, **sizes).wire["expert"] == 4 * (n - 1) / n * slots * SIZES.num_layers


def test_experts_divide_their_state_and_are_summed_over_the_other_rows_alone(found: SearchResult):
    whole, split = on(found, data=8), on(found, data=2, expert=4)
    experts = 3 * SIZES.num_layers * SIZES.experts * SIZES.embed_dim * SIZES.expert_mlp * 4
    assert whole.state - split.state == 3 * experts * 3 / 4  # with both moments of adam
    assert split.wire["data"] == 2 * 1 / 2 * experts / 4


def test_what_cannot_be_followed_has_its_reason(found: SearchResult):
    assert "4 experts do not divide over expert=8" in found.rejected
    assert "one reduction for all micro-batches beside experts" in found.rejected
    for sizes, why in (
        (
            dataclasses.replace(SIZES, capacity_factor=None),
            "dropless experts, whose number of rows",
        ),
        (
            dataclasses.replace(SIZES, experts=None, expert_mlp=None, capacity_factor=None),
            "the loss has no sk.nn.experts",
        ),
    ):
        assert any(text.startswith(why) for text in found_in(decoder(sizes)).rejected)
    beside = found_in(decoder(), dataclasses.replace(SPACE, axes=("pipe", "expert")))
    assert "experts beside a pipeline or a split length" in beside.rejected


@pytest.mark.slow
def test_a_plan_looks_over_experts_where_a_model_has_them():
    made = plan(decoder(), TARGET)
    sizes = dict(made.rows[0].mesh)
    assert "expert" in sizes
    weighed, _, left = str(made).partition("; not weighed: ")
    assert weighed.endswith("bounded experts, tensor with sequence")
    assert "dropless experts" in left


def test_experts_as_declared_cost_what_the_plan_says(found: SearchResult):
    sizes, made = {"data": 2, "expert": 2, "tensor": 2}, {"sk": sk}
    planned, network = on(found, **sizes), Network.of(Target.parse(TARGET))
    exec(planned.declaration, made)
    assert (made["mesh"], made["strategy"]) == (sk.MeshSpec(**sizes), make_strategy(sizes))
    declared = dataclasses.replace(decoder(), strategy=made["strategy"])
    own = estimate_step(declared, sizes, network)
    assert (own.state, own.batch) == (planned.state, planned.batch)
    assert own.wire == pytest.approx(planned.wire)
    assert (own.temp, own.seconds) == pytest.approx((planned.temp, planned.seconds))
    dropless = decoder(dataclasses.replace(SIZES, capacity_factor=None))
    with pytest.raises(NotImplementedError, match="dropless experts"):
        estimate_step(dataclasses.replace(dropless, strategy=made["strategy"]), sizes, network)
