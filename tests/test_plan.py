"""Plans: what is estimated equals what is compiled where it must, and bad input is said clearly."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import optax
import pytest

import shardkit as sk
from shardkit._core.errors import MeshError
from shardkit.cli import main
from shardkit.data import DataConfig
from shardkit.hardware import CHIPS
from shardkit.lm import DecoderConfig, declare_run
from shardkit.mesh import Target
from shardkit.planner import Candidate, Plan, SearchSpace, compile_best, plan
from shardkit.planner._network import Network
from shardkit.planner._program import flatten_jaxpr
from shardkit.planner._space import make_strategy
from shardkit.planner._symbolic_sharding import reshape_dims
from shardkit.planner._trace import TracedModel, propagate_step
from shardkit.report import count_flops
from shardkit.report.communication._links import Links
from shardkit.targets import StepSource

ROWS = 16
TARGET = "tpu:v5p:2x2x2"
DECODER = DecoderConfig(vocab=256, embed_dim=32, num_layers=2, num_heads=4, mlp_dim=64)
SPACE = SearchSpace(("data", "fsdp", "tensor"), remat=("none", "full"), accumulate=(1, 2))


def decoder(rows: int = ROWS) -> sk.StepSpec:
    both = make_strategy({"fsdp": 2, "tensor": 2})
    data = DataConfig(seq_len=32, batch_size=rows)
    return declare_run(DECODER, data, both, optax.adamw(1e-3))


def two_products() -> sk.StepSpec:
    """A user's own model: a column- and a row-split product, in f32."""

    def init(key: jax.Array) -> dict[str, sk.WithAxes]:
        up, down = jnp.zeros((32, 64)), jnp.zeros((64, 32))
        return {
            "up": sk.WithAxes(up, ("embed", "mlp")),
            "down": sk.WithAxes(down, ("mlp", "embed")),
        }

    def loss(params: dict[str, jax.Array], batch: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.mean((jnp.tanh(batch @ params["up"]) @ params["down"]) ** 2)

    batch = jax.ShapeDtypeStruct((ROWS, 32), "float32")
    return sk.StepSpec(
        loss_fn=loss,
        optimizer=optax.adamw(1e-3),
        init=init,
        batch=batch,
        strategy=make_strategy({"data": 2}),
    )


def with_loss(loss) -> Plan:
    declared = two_products().replace(loss_fn=loss)
    return plan(declared, TARGET, space=SearchSpace(accumulate=(1,), remat=("none",)))


def test_what_is_not_costed_or_not_weighed_is_said(products: Plan) -> None:
    def counting(params, batch, key):  # type: ignore[no-untyped-def]
        x = jax.lax.while_loop(lambda x: jnp.sum(x) < 9.0, lambda x: x + 1.0, batch)
        return jnp.mean(jnp.tanh(jax.lax.stop_gradient(x) @ params["up"]) @ params["down"])

    assert products.problems == ()
    (problem,) = with_loss(counting).problems
    assert "a while loop runs an unknown number of times" in problem
    left = str(products).partition("not weighed: bounded experts, ")[2]
    for variant in ("dropless experts", "tensor without sequence", "uneven stages"):
        assert variant in left
    why = "the loss marks no layers with sk.nn.layer_stack, which pipe would divide"
    assert why in products.rejected


def test_a_loss_that_raises_is_a_reason_and_no_crash() -> None:
    def broken(params, batch, key):  # type: ignore[no-untyped-def]
        raise ValueError("no such table")

    with pytest.raises(MeshError, match="ValueError: no such table"):
        with_loss(broken)


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan(decoder(), TARGET, space=SPACE)


@pytest.fixture(scope="module")
def products() -> Plan:
    return plan(two_products(), TARGET, space=SearchSpace(accumulate=(1,), remat=("none",)))


def on(made: Plan, zero: int = 0, remat: str = "none", **sizes: int) -> Candidate:
    """The candidate on a mesh, without accumulation."""
    return next(
        c
        for c in (*made.rows, *made.tight)
        if {axis: n for axis, n in c.mesh.items() if n > 1} == sizes
        and (c.zero, c.remat, c.accumulate.micro_batches) == (zero, remat, 1)
    )


@pytest.mark.parametrize(
    ("sizes", "zero"),
    [({"fsdp": 4, "tensor": 2}, 0), pytest.param({"data": 8}, 1, marks=pytest.mark.slow)],
)
def test_state_is_what_the_executable_holds(planned, sizes, zero):
    declared = decoder()
    layout = make_strategy(sizes, zero)
    step = sk.compile_step(
        declared.loss_fn,
        declared.optimizer,
        init=declared.init,
        batch=declared.batch,
        mesh=sk.MeshSpec(**sizes).build(),
        strategy=layout,
    )
    memory = step.report().memory
    found = on(planned, zero, **sizes)
    assert found.state == memory.params + memory.opt_state + memory.model_state + memory.rest
    assert found.batch == memory.batch


def test_flat_programs_have_the_flops_of_the_jaxpr():
    model, sizes = TracedModel.of(decoder()), {"data": 2, "fsdp": 2, "tensor": 2}
    layout = make_strategy(sizes)
    found = propagate_step(model.program("full"), model.layout(sizes, layout), layout)
    mine = sum(work.flops * work.site.trips for work in found.log.compute)
    assert mine == count_flops(model.gradient_jaxpr("full")).total


def test_fsdp_sends_the_textbook_bytes(products):
    weights = 2 * 32 * 64 * 4
    scattered = 7 / 8 * weights
    # Outside of loops what was gathered for the forward pass is there for the backward pass.
    gathered = 7 / 8 * weights
    assert on(products, fsdp=8).wire["fsdp"] == pytest.approx(scattered + gathered, rel=1e-3)


def test_data_sends_one_reduction_of_the_gradients(products):
    gradients = 2 * 32 * 64 * 4
    assert on(products, data=8).wire["data"] == pytest.approx(2 * 7 / 8 * gradients, rel=1e-3)


def test_tensor_sums_what_its_products_contract(products):
    summed = ROWS * 32 * 4
    assert on(products, tensor=8).wire["tensor"] == pytest.approx(2 * 7 / 8 * summed, rel=0.05)


def test_recomputation_takes_time_and_gives_memory(planned):
    none, full = (on(planned, remat=remat, fsdp=8) for remat in ("none", "full"))
    assert full.compute > none.compute
    assert full.temp < none.temp


def test_every_layout_is_ranked_or_has_a_reason(planned):
    meshes = len(SPACE.meshes(8)) + 2 * len([m for m in SPACE.meshes(8) if m["data"] > 1])
    layouts = meshes * len(SPACE.remat) * len(SPACE.batchings({}))
    left_out = sum(n for n, _ in planned.rejected.values())
    assert planned.considered == layouts == len(planned.rows) + len(planned.tight) + left_out
    assert any("heads" in why and "tensor=8" in why for why in planned.rejected)
    seconds = [c.seconds for c in planned.rows]
    assert seconds == sorted(seconds)


def test_a_declaration_can_be_pasted(planned):
    made: dict[str, object] = {"sk": sk}
    exec(planned.best.declaration, made)
    used = {axis: n for axis, n in planned.best.mesh.items() if n > 1}
    assert made["mesh"] == sk.MeshSpec(**used)
    assert made["strategy"] == make_strategy(planned.best.mesh, planned.best.zero)


def test_the_front_is_faster_or_smaller(planned):
    front = planned.pareto()
    assert front[0].seconds == min(c.seconds for c in planned.rows)
    totals = [c.total for c in front]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] == min(c.total for c in planned.rows)


def test_a_plan_says_why_and_what_would_change_it(planned):
    text = str(planned)
    assert "bound by" in text
    assert "mesh = sk.MeshSpec(" in text
    assert "2 x link bandwidth" in text
    assert "hidden behind compute" in text
    assert '"declaration"' in planned.to_json()


def test_a_batch_that_nothing_divides():
    with pytest.raises(MeshError, match="global batch 13 must be a multiple of 8") as caught:
        plan(
            decoder(13), TARGET, space=SearchSpace(axes=("fsdp",), accumulate=(1,), remat=("none",))
        )
    assert "or a global batch that they divide" in str(caught.value)


def test_a_model_that_fits_nowhere(monkeypatch):
    small = dataclasses.replace(Network.of(Target.parse(TARGET)).chip, memory=1000)
    monkeypatch.setitem(CHIPS, "v5p", small)
    with pytest.raises(MeshError) as caught:
        plan(two_products(), TARGET, space=SearchSpace(accumulate=(1,), remat=("full",)))
    text = str(caught.value)
    assert "No layout fits on tpu:v5p:2x2x2" in text
    assert "are missing" in text
    assert "a device with" in text


def test_devices_that_nothing_is_known_of():
    with pytest.raises(MeshError, match=r"cpu:8 .*hardware table.*"):
        plan(decoder(), "cpu:8")
    with pytest.raises(MeshError, match="Did you mean 'v5p'"):
        plan(decoder(), "tpu:v5q:2x2x2")
    with pytest.raises(MeshError, match="known: pipe, data, fsdp, context, expert, tensor"):
        SearchSpace(axes=("fsdpp",))


def test_numbers_that_cannot_be_are_refused_at_once():
    with pytest.raises(MeshError) as error:
        plan(decoder(), "tpu:v5p:2x2x2", global_batch=-4, overlap=2)
    assert "global_batch=-4  is not positive" in str(error.value)
    assert "overlap=2        is not a share of communication" in str(error.value)


def shaped(shape: tuple[int, ...], row_dims: dict[str, int | None] | None = None) -> sk.StepSpec:
    """A user's step with one leaf `x` in its batch."""
    return two_products().replace(
        loss_fn=lambda params, batch, key: jnp.mean(jnp.sum(batch["x"]) * params["up"] ** 2),
        batch={"x": jax.ShapeDtypeStruct(shape, "float32")},
        row_dims=row_dims,
    )


@pytest.mark.parametrize(
    ("shape", "row_dims"), [((0, 32), None), ((5, 8, 32), {"x": 1}), ((5, 0, 32), {"x": 1})]
)
def test_the_global_batch_replaces_the_rows_wherever_they_are(shape, row_dims) -> None:
    space = SearchSpace(axes=("data",), accumulate=(4,), remat=("none",))
    planned = plan(shaped(shape, row_dims), TARGET, global_batch=32, space=space)
    assert planned.best.mesh == {"data": 8}
    with pytest.raises(MeshError, match="a batch of 48 rows that does not split"):
        plan(shaped(shape, row_dims), TARGET, global_batch=48, space=space)


@pytest.mark.parametrize(
    ("shape", "row_dims", "rows", "said"),
    [
        ((0, 32), None, None, "batch  has 0 rows"),
        ((16, 32), {"x": None}, 8, "no leaf has rows, so global_batch=8 sets none"),
        ((), None, 8, "no leaf has rows, so global_batch=8 sets none"),
    ],
)
def test_a_batch_without_rows_is_refused_where_rows_are_meant(shape, row_dims, rows, said) -> None:
    with pytest.raises(MeshError, match=said):
        plan(shaped(shape, row_dims), TARGET, global_batch=rows)


def test_a_step_without_rows_has_no_crossover_of_rows() -> None:
    space = SearchSpace(axes=("fsdp",), accumulate=(1,), remat=("none",))
    planned = plan(shaped((16, 32), {"x": None}), TARGET, space=space)
    assert "rows" not in str(planned.changes)
    assert not [what for what, *_ in planned.sensitivity if "rows" in what]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compile", "-3"], "--compile -3  must be at least 0"),
        (["--json", f"{__file__}/plan.json"], "is not a folder that this user may write to"),
    ],
)
def test_the_command_refuses_before_anything_is_planned(words, said, capsys):
    assert main(["plan", "--target", "tpu:v5p:2x2x2", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_chip_of_a_users_own_is_planned_for(products):
    slow = dataclasses.replace(CHIPS["v5p"], name="mine", link=1e6)
    space = SearchSpace(accumulate=(1,), remat=("none",))
    made = plan(two_products(), "tpu:mine:2x2x2", space=space, hardware=[slow])
    sizes = {"fsdp": 8}
    links = [on(one, **sizes).communication["fsdp"] for one in (made, products)]
    assert links[0] > 100 * links[1]  # a hop takes what it took
    assert on(made, **sizes).wire == on(products, **sizes).wire
    with pytest.raises(MeshError, match="unknown chip 'mine'"):
        plan(two_products(), "tpu:mine:2x2x2")


def test_axes_ride_the_torus():
    network = Network.of(Target.parse("tpu:v5p:4x4x4:2"))
    sizes = {"data": 2, "fsdp": 16, "tensor": 4}
    assert network.crossing_axis(sizes) == "data"
    assert network.rates([sizes], ["data"])[0] == network.chip.network
    links = Links(network.chip, tuple(sizes.items()))
    for axes in (["tensor"], ["fsdp", "tensor"]):  # a plan and a timeline have one rule
        assert network.rates([sizes], axes)[0] == links.bandwidth(axes) > network.chip.link
    gpus = Network.of(Target.parse("gpu:h100:2x8"))
    fast, slow = (gpus.rates([{"data": 2, "tensor": 8}], [a])[0] for a in ("tensor", "data"))
    assert (fast, slow) == (gpus.chip.link, gpus.chip.network)


def test_reshapes_keep_the_axes_of_a_group():
    assert reshape_dims([("a",), ("b",)], (4, 8), (32,)) == (("a", "b"),)
    assert reshape_dims([("a",)], (32,), (4, 8)) == (("a",), ())
    assert reshape_dims([(), ("a",), ()], (1, 8, 2), (8, 2)) == (("a",), ())


def test_what_no_result_needs_is_left_out():
    flat = flatten_jaxpr(jax.make_jaxpr(lambda x: (jnp.sin(x), x + 1)[1])(1.0))
    assert [op.name for op in flat.ops] == ["add"]


def test_the_best_are_compiled_and_what_fails_is_a_row(tmp_path, planned):
    """Without the target's compiler every compile fails: a reason each, and the plan stands."""
    source = StepSource(str(tmp_path / "missing.py"))
    made = compile_best(planned, source, 1)
    (failed,) = [c for c in made.rows if c.failed]
    assert "missing.py" in failed.failed
    assert len(made.rows) == len(planned.rows)
    assert made.best == planned.rows[1]


def test_a_command_plans(capsys, tmp_path):
    out = tmp_path / "plan.json"
    words = ["plan", "tests._declared:step", "--target", "tpu:v5e:2x2"]
    assert main([*words, "--compile", "0", "--json", str(out)]) == 0
    assert "mesh = sk.MeshSpec(" in capsys.readouterr().out
    assert json.loads(out.read_text())["target"] == "tpu:v5e:2x2"
    assert main(words) == 2
    assert "--compile 0" in capsys.readouterr().err
