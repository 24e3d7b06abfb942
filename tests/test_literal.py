"""Names that users chose are printed as they are, in every table."""

import io
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from shardkit._core.scope_markers import annotate_branch_counts, branch_shares
from shardkit.report import Finding, Flops, Ledger, Memory, Report, count_flops
from shardkit.run._console import show_layout, show_mesh
from shardkit.sweeps._case import SweepCase
from shardkit.sweeps._row import FAILED, SweepRow
from shardkit.sweeps._show import format_sweep

ODD = ["attn[local]", "[/nope]", "[bold]x[/]", ":fire:"]


def report(name: str) -> Report:
    finding = Finding(
        "replicated", leaf=f"params/{name}", axes=("[/x]",), bytes=64, why=name, fix=name
    )
    memory = Memory(0, 0, 0, 0, 0, None, None, None, None, None)
    flops = Flops(8, 0, {(name, "forward"): 8})
    mesh = ((name, 2),)
    return Report(mesh, "cpu", name, Ledger((), mesh), memory, flops, (finding,))


@pytest.mark.parametrize("name", ODD)
def test_a_report_prints_odd_names_as_they_are(name):
    text = str(report(name))
    assert f"params/{name}" in text
    assert f"{name}." in text
    assert f"Fix, not tried: {name}" in text
    assert f"({name}=2)" in text
    (scope,) = (line for line in text.splitlines() if line.endswith("100.0%"))
    assert scope.startswith(name)


@pytest.mark.parametrize("name", ODD)
def test_a_sweep_prints_odd_names_as_they_are(name):
    case = SweepCase(((name, 2),), remat=name)
    text = format_sweep(name, [], [SweepRow(case, FAILED, {}, f"why {name}")], "memory")
    assert f"why {name}" in text
    assert f" {name} " in text


@pytest.mark.parametrize("name", ODD)
def test_a_run_prints_odd_names_as_they_are(name):
    console = Console(file=io.StringIO(), width=100)
    mesh = Mesh(np.array(jax.devices()[:2]), (name,))
    show_mesh(console, mesh)
    leaf = jax.device_put(jnp.ones(2), NamedSharding(mesh, P(name)))
    show_layout(console, types.SimpleNamespace(params={name: leaf}, opt_state=()))
    text = console.file.getvalue()
    assert f"mesh {name}=2 " in text
    assert any(line.startswith(f"{name} ") for line in text.splitlines())


def test_a_scope_of_a_users_says_nothing_of_branches():
    def f(scope, x):
        with jax.named_scope(scope):
            return jax.lax.cond(x[0, 0] > 0, lambda: x @ x, lambda: x)

    x = jnp.ones((4, 4))
    for scope in ("taken_2", "taken_1_3", "shardkit_taken_2"):
        assert count_flops(jax.make_jaxpr(f, static_argnums=0)(scope, x)).model == 2 * 4**3
    assert branch_shares("jit(step)/taken_1_3/cond", 2) is None

    def told(x):
        with annotate_branch_counts([1, 3]):
            return jax.lax.cond(x[0, 0] > 0, lambda: x, lambda: x @ x)

    assert (
        count_flops(jax.make_jaxpr(told)(x)).model == 2 * 4**3 // 4
    )  # branch 0 is the one for False
