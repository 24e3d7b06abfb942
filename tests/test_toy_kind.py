"""One more kind of parallelism, in this file alone: ledger, minimum, plan and sweep know it."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar, final

import jax
import jax.numpy as jnp
import optax
import pytest

import shardkit as sk
from shardkit.parallel import DeviceBytes, Kind, check_composition, register_kind, strategies
from shardkit.planner import SearchSpace, estimate_step, plan
from shardkit.report import LedgerRow, Program, Report
from shardkit.sweeps import ConfigFactory

ROWS, EMBED, MLP, PROBE = 64, 128, 256, 4096
ALL_REDUCED = 2 * 3 * ROWS * EMBED  # bytes that one of 4 devices sends of f32[ROWS, EMBED]
APART = "of products that are summed apart"


def columns(axis: str = "columns") -> sk.Strategy:
    """Splits the hidden units of column-row pairs."""
    return sk.Strategy(
        params=sk.AxisRules({"embed": None, "mlp": axis}),
        activations=sk.AxisRules({"batch": None, "embed": None, "mlp": axis}),
        kinds=(Columns(axis),),
    )


@final
@dataclasses.dataclass(frozen=True)
class Columns(Kind):
    """One all-reduce of the result of each pair."""

    name: ClassVar[str] = "columns"
    splits = frozenset({"heads"})
    collectives = frozenset({"all-reduce"})
    planned = "columns of pairs"
    factory = staticmethod(columns)

    def minimum(self, program: Program) -> float | None:
        """The result of one pair, reduced once."""
        stated = program.declared.constraints
        of_pair = [x for x in stated if x.leaf.axes and x.leaf.axes[-1] == "embed"]
        if not of_pair:
            return None
        n = program.sizes[self.axis]
        return 2 * (n - 1) / n * of_pair[0].device_bytes(program.sizes)

    def excess(
        self, row: LedgerRow, rows: Sequence[LedgerRow], program: Program
    ) -> Iterator[tuple[str, float]]:
        """Results of pairs that were not added up before they were reduced."""
        arrays = sum(len(one.operands) for one in rows)
        yield APART, 1 - 1 / arrays

    def extra_bytes(self, held: DeviceBytes) -> float:
        """What its models send under a `shard_map` of their own."""
        return PROBE * (held.sizes[self.axis] - 1)


def init(key):
    def named(*dims):
        sizes = {"embed": EMBED, "mlp": MLP}
        return sk.WithAxes(jax.random.normal(key, tuple(sizes[d] for d in dims)), dims)

    return {"up": named("embed", "mlp"), "down": named("mlp", "embed")}


def pair(params, x, *names):
    hidden = sk.nn.constrain(jnp.tanh(x @ params["up"]), "batch", "mlp")
    hidden = sk.nn.constrain(jnp.sin(hidden), *names) if names else hidden
    return sk.nn.constrain(jnp.tanh(hidden) @ params["down"], "batch", "embed")


def once(params, batch, key):
    return jnp.mean(pair(params, batch["x"]) ** 2)


def apart(params, batch, key):
    x = batch["x"]
    return jnp.mean(jnp.sin(pair(params, x)) * jnp.cos(pair(params, x + 1)))


def gathered(params, batch, key):
    return jnp.mean(pair(params, batch["x"], "batch", "embed") ** 2)


def spec_of(loss, strategy=None, mode="auto"):
    return sk.StepSpec(
        loss_fn=loss,
        optimizer=optax.sgd(0.1),
        init=init,
        batch={"x": jax.ShapeDtypeStruct((ROWS, EMBED), jnp.float32)},
        strategy=strategy or strategies.data() | columns(),
        mode=mode,
    )


def reported(loss, strategy=None):
    return compiled(loss, strategy).report()


def compiled(loss, strategy=None, mode="auto"):
    mesh = sk.MeshSpec(data=2, columns=4).build()
    return spec_of(loss, strategy, mode).compile(mesh)


def over_columns(report):
    return {one.kind for one in report.findings if "columns" in one.axes}


def test_its_collectives_are_explained_and_at_its_minimum():
    report = reported(once)
    (least,) = [one for one in report.minima if one.axis == "columns"]
    assert not over_columns(report)
    assert least.wire == ALL_REDUCED // 2  # of half of the rows
    assert (least.kind, least.ratio, least.excess) == ("columns", 1.0, ())
    assert Report.from_json(report.to_json()) == report


def test_without_it_they_are_findings_and_no_minimum_is_known():
    alone = dataclasses.replace(strategies.data() | columns(), kinds=strategies.data().kinds)
    report = reported(once, alone)
    assert over_columns(report) == {"unexplained_collective"}
    assert [one.axis for one in report.minima] == ["data"]
    assert "No textbook minimum for columns" in str(report)


def test_what_it_does_not_send_is_a_finding():
    assert "unexplained_collective" in over_columns(reported(gathered))


def test_what_exceeds_its_minimum_is_said_in_its_words():
    report = reported(apart)
    (least,) = [one for one in report.minima if one.axis == "columns"]
    assert not over_columns(report)
    assert least.ratio == 2.0
    assert least.excess == ((APART, least.wire // 2),)
    assert f"{APART}" in str(report)


def test_it_composes_as_it_says():
    check_composition(strategies.data() | columns(), {"data": 2, "columns": 4})
    with pytest.raises(sk.errors.ShardingError, match="is taken by columns and by tensor"):
        check_composition(columns() | strategies.tensor("columns"), {"columns": 4})
    text = "columns parallelism +over mesh axis .columns. is left to the partitioner"
    with pytest.raises(sk.errors.StepError, match=text):
        compiled(once, mode="shard_map")


def test_a_plan_tries_names_and_estimates_it():
    known = {"accumulate": (1,), "remat": ("none",), "zero": (0,)}
    with pytest.raises(sk.errors.MeshError, match="columns"):
        SearchSpace(axes=("data", "columns"), **known)
    with register_kind(Columns("columns")):
        assert SearchSpace().axes[-1] == "columns"
        made = plan(spec_of(once), "tpu:v5e:2x2", space=SearchSpace(("data", "columns"), **known))
    assert made.assumptions[-1].startswith("layouts are data and ZeRO, columns of pairs; not")
    (found,) = [c for c in made.rows if c.mesh == {"data": 1, "columns": 4}]
    assert f"strategy = {__name__}.columns()" in found.declaration
    # The walk finds the all-reduce by the names of dims; the kind adds what no name tells.
    assert found.wire["columns"] == ALL_REDUCED + 3 * PROBE


def test_one_declared_step_is_modelled_with_it():
    sent = estimate_step(spec_of(once, columns()), {"columns": 4}).wire
    assert sent["columns"] == ALL_REDUCED + 3 * PROBE


def test_a_sweep_lays_out_its_axis(tmp_path):
    factory = ConfigFactory("", ("model=nano", "data.seq_len=32", "data.batch_size=4"))
    with pytest.raises(sk.errors.ConfigError, match="columns"):
        factory.select_axes(("columns",))
    with register_kind(Columns("columns")):
        found = sk.sweep(factory, out=tmp_path, axes=("columns",), devices=2)
    (row,) = found.rows
    assert (row.status, row.case.shown) == ("ok", "columns=2")
    assert row.compiled["axes"]["columns"]["kind"] == "columns"
    assert "unexplained_collective" not in row.compiled["findings"]
    assert row.modelled["axes"]["columns"] == PROBE  # alone; with the idle axes what names tell
    assert row.modelled["axes"]["tensor, columns"] > 0
