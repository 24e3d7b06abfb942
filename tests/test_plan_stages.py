"""Pipelines and split lengths in a plan: formulae, reasons, and what meshes share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardkit as sk
from shardkit.data import DataConfig
from shardkit.lm import DecoderConfig, declare_run
from shardkit.mesh import Target
from shardkit.nn._attention import attention
from shardkit.planner import Candidate, SearchSpace
from shardkit.planner._declared_step import estimate_step
from shardkit.planner._network import Network
from shardkit.planner._search import Search, SearchResult
from shardkit.planner._space import PipelineOptions, make_strategy
from shardkit.planner._stages import _schedule_seconds, read_tick_roles

TARGET = "tpu:v5p:2x2x2"
SPACE = SearchSpace(remat=("full",), accumulate=(1,))
B, T, N, H = 8, 16, 4, 8


def attending() -> sk.StepSpec:
    """Attention of a row on itself, in f32, and nothing else."""

    def loss(w: jax.Array, batch: jax.Array, key: jax.Array) -> jax.Array:
        q = sk.nn.constrain(
            (batch @ w).reshape(-1, T, N, H), "batch", "length", "heads", "head_dim"
        )
        out = attention(q, q * 2, q * 3)
        return jnp.mean(sk.nn.constrain(out, "batch", "length", "heads", "head_dim") ** 2)

    batch = jax.ShapeDtypeStruct((B, T, 8), "float32")
    init = lambda key: sk.WithAxes(jnp.zeros((8, N * H)), (None, None))  # noqa: E731
    return sk.StepSpec(
        loss_fn=loss,
        optimizer=optax.sgd(1e-3),
        init=init,
        batch=batch,
        strategy=make_strategy({"data": 2}),
    )


def decoder(layers: int = 2, rows: int = 16) -> sk.StepSpec:
    sizes = DecoderConfig(vocab=256, embed_dim=32, num_layers=layers, num_heads=4, mlp_dim=64)
    data = DataConfig(seq_len=32, batch_size=rows)
    return declare_run(sizes, data, make_strategy({"data": 2}), optax.adamw(1e-3))


def search_of(declared: sk.StepSpec, space: SearchSpace) -> Search:
    return Search.of(declared, Target.parse(TARGET), space, 0.0)


@pytest.fixture(scope="module")
def search() -> Search:
    return search_of(decoder(), SPACE)


@pytest.fixture(scope="module")
def found(search: Search) -> SearchResult:
    return search.run()


def on(
    found: SearchResult, how: PipelineOptions | None, attention: str = "", **sizes: int
) -> Candidate:
    return next(
        c
        for c in found.candidates
        if {axis: n for axis, n in c.mesh.items() if n > 1} == sizes
        and (c.pipeline, c.attention, c.zero) == (how, attention, 0)
    )


@pytest.mark.parametrize(("stages", "micro"), [(2, 4), (4, 8)])
def test_a_tick_lasts_as_long_as_its_longest_stage(stages, micro):
    forward, backward, first = 1.0, 2.0, 10.0
    filled = micro + stages - 1
    made = read_tick_roles(PipelineOptions("gpipe", micro), stages)
    # The last stage goes forward within its backward pass alone, so the tick that is all its own
    # costs nothing.
    length = (filled - 1) * forward + filled * (forward + backward)
    assert _schedule_seconds(made, np.array([0.0, forward, 0.0, backward, 0.0])) == length
    # The first stage embeds each micro-batch twice, while all others wait for it.
    longer = length + 2 * micro * first
    assert _schedule_seconds(made, np.array([first, forward, 0.0, backward, 0.0])) == longer


def test_zero_bubbles_wait_less_and_interleaving_more_often_sends():
    busy = np.array([0.0, 1.0, 0.0, 0.0, 0.0])  # every tick costs the same
    gpipe, one, more = (
        read_tick_roles(PipelineOptions(n, 8), 4) for n in ("gpipe", "1f1b", "zero_bubble")
    )
    apart = read_tick_roles(PipelineOptions("interleaved", 8, 2), 4)
    waits = [_schedule_seconds(made, busy) - made.mean @ busy for made in (apart, gpipe)]
    assert waits[0] < waits[1]
    assert more.slots < gpipe.slots
    assert one.slots < gpipe.slots
    # Each of 8 micro-batches over 3 boundaries and back, and what an exchange sends besides.
    assert apart.messages > gpipe.messages >= 2 * 8 * 3 / 4


def test_a_stage_sends_one_activation_over_each_boundary(found: SearchResult):
    how = PipelineOptions("gpipe", 8)
    message = 16 / 2 / 8 * 32 * 32 * 4  # one row, in f32
    assert on(found, how, pipe=2, data=2, tensor=2).wire["pipe"] == 8 * message


def test_layers_on_stages_divide_state_and_work(found: SearchResult):
    one, two = on(found, None, data=8), on(found, PipelineOptions("1f1b", 2), pipe=2, data=4)
    assert two.state < one.state
    assert two.bubble > 0 == one.bubble
    assert "1f1b of 2 micro-batches" in str(two)


@pytest.mark.parametrize("way", ["ring", "all_to_all"])
def test_attention_sends_what_its_formula_says(way):
    n = 4
    space = SearchSpace(("context", "data"), accumulate=(1,), remat=("none",), zero=(0,))
    made = search_of(attending(), space).run()
    sent = on(made, None, way, context=n, data=2).wire["context"]
    q = B / 2 * T / n * N * H * 4
    keys = 2 * q
    ring = 3 * (n - 1) * keys + 2 * q + keys
    assert sent == {"ring": ring, "all_to_all": (n - 1) / n * 2 * (2 * q + keys)}[way]


def test_every_layout_that_cannot_be_has_its_reason(found: SearchResult):
    assert "2 layers do not split evenly into 4 stages" in found.rejected
    assert "2 layers do not split evenly into 4 virtual stages" in found.rejected
    assert "4 heads do not split over context=8 x tensor=1" in found.rejected
    rows = "a batch of 16 rows that does not split into devices x micro-batches"
    assert "gpipe of 8 micro-batches" in found.rejected[rows][1]
    left_out = sum(n for n, _ in found.rejected.values())
    assert found.considered == len(found.candidates) + left_out
    (why,) = search_of(attending(), dataclasses.replace(SPACE, axes=("pipe",))).run().rejected
    assert why == "the loss marks no layers with sk.nn.layer_stack, which pipe would divide"


def test_meshes_that_share_a_resolution_get_what_each_would_alone(search: Search):
    resolver, sizes = search.resolver, SPACE.meshes(8)
    layouts = [(one, zero) for one in sizes for zero in (0, 1) if not zero or one["data"] > 1]
    for layout in layouts:
        assert resolver.resolve(*layout) == resolver.resolve_alone(*layout)
    assert len(resolver.cache) < len(layouts)


def test_a_pipeline_can_be_pasted(found: SearchResult):
    for how, way in (
        (PipelineOptions("zero_bubble", 2), "ring"),
        (PipelineOptions("1f1b", 4), "all_to_all"),
    ):
        sizes, made = {"pipe": 2, "data": 2, "context": 2}, {"sk": sk}
        exec(on(found, how, way, **sizes).declaration, made)
        assert made["mesh"] == sk.MeshSpec(**sizes)
        assert made["strategy"] == make_strategy(sizes, 0, way, how)
        assert made["accumulate"] == 1


def test_a_step_as_declared_costs_what_the_plan_says():
    axes = ("pipe", "data", "context")
    space = SearchSpace(axes, accumulate=(1,), remat=("full",), zero=(0,), max_size={"data": 4})
    found, network = search_of(decoder(), space).run(), Network.of(Target.parse(TARGET))
    for how in (PipelineOptions("zero_bubble", 2), PipelineOptions("1f1b", 4), None):
        sizes = {"pipe": 2, "data": 2, "context": 2} if how else {"data": 4, "context": 2}
        for way in ("ring", "all_to_all"):
            planned = on(found, how, way, **sizes)
            strategy = dataclasses.replace(make_strategy(sizes, 0, way, how), remat="full")
            own = estimate_step(dataclasses.replace(decoder(), strategy=strategy), sizes, network)
            assert (own.state, own.batch) == (planned.state, planned.batch)
            assert own.wire == pytest.approx(planned.wire)
            assert (own.temp, own.seconds) == pytest.approx((planned.temp, planned.seconds))
