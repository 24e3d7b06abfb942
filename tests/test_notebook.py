"""What a notebook shows of each value: short text, small HTML, no markup of a user's names."""

import html.parser
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import shardkit as sk
from shardkit._core.io._notebook import notebook_html, text_html
from shardkit._core.io._table import Column, Table
from shardkit._core.tree import format_bytes
from shardkit.parity._parity_report import ParityReport, ParityRow
from shardkit.planner._result import Plan
from shardkit.report import Program, Report
from shardkit.run._history import read_histories
from shardkit.sweeps import Sweep, SweepCase, SweepRow
from shardkit.sweeps._row import compiled_figures

from ._programs import recorded
from .test_html import EVIL
from .test_html import report as small_report

ROOT = Path(__file__).parent.parent
FEW_KIB = 8 * 1024


class Seen(html.parser.HTMLParser):
    """Tags and texts as a browser takes them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def large():
    mesh = (("fsdp", 4), ("tensor", 4))
    return Report.of(Program(recorded("tpu_v5p_fsdp_tensor"), mesh, "tpu", "TPU v5p"))


def spec():
    rows = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    return sk.StepSpec(
        loss_fn=lambda params, batch, key: jnp.mean(batch["x"] @ params["w"]),
        optimizer=optax.adam(0.1),
        init=lambda key: {"w": jnp.ones((4, 2))},
        batch={"x": rows, **{f"{EVIL}{n}": rows for n in range(40)}},
        strategy=sk.strategies.data() | sk.strategies.tensor(),
    )


def history(folder):
    lines = [{"kind": "start"}, *({"kind": "step", "step": i, "loss": 1 / i} for i in range(1, 4))]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_histories([folder])[0]


def values(large, folder):
    case = SweepCase((("data", 2), ("tensor", 4)))
    figures = compiled_figures(small_report())
    seconds = {"compile_seconds": {"whole": 1.0}}
    row = SweepRow(case, "ok", {"target": "local"}, compiled=figures, measured=seconds)
    checks = [ParityRow(f"(data={n})", "loss", EVIL, 1e-8, 1e-8, 1e-7) for n in range(200)]
    return {
        "Report(": large,
        "Report(cpu, data=2": small_report(),
        "Ledger(": large.ledger,
        "BySource(": small_report().by_source(),
        "Comparison(": large.compare(small_report()),
        "MeshSpec(data=2": sk.MeshSpec(data=2, tensor=4),
        "Strategy(data over data | tensor over tensor": spec().strategy,
        "StepSpec(loss=": spec(),
        "ParityReport(200 of 200 checks passed on 200 meshes": ParityReport(tuple(checks), EVIL),
        "Sweep(1 of 1 cases ranked, first data=2,tensor=4": Sweep((row,), folder, EVIL),
        "History(run: 3 updates, loss 1 → 0.3333": history(folder / "run"),
    }


def test_every_value_shows_itself_in_a_line_and_in_a_few_kib(large, tmp_path):
    for start, value in values(large, tmp_path).items():
        text, shown = repr(value), value._repr_html_()
        assert text.startswith(start)
        assert len(text) < 1000
        assert "\n" not in text
        assert len(shown) < FEW_KIB, start
        seen = Seen(shown)
        assert not {"script", "link", "style", "iframe"} & set(seen.tags), start
        assert "http" not in shown


def test_a_reports_card_has_its_figures_and_not_the_page(large):
    seen = " ".join(Seen(large._repr_html_()).texts)
    for axis in large.traffic:
        assert f"{axis.axis} {format_bytes(axis.sent)}" in seen
    assert f"{len(large.findings)} findings" in seen
    assert len(large.to_html()) > 10 * len(large._repr_html_())
    unread = small_report(ledger=large.ledger.__class__((), large.ledger.mesh, ("cut off",)))
    assert "cut off" in unread._repr_html_()
    assert "at least 0 B" in unread._repr_html_()


def test_cells_are_escaped_cut_and_counted():
    table = Table(["name", Column("n", right=True)], [(EVIL, str(n)) for n in range(20)])
    seen = Seen(shown := notebook_html(EVIL, table, {"fact": "x" * 500, "none": ""}))
    assert set(seen.tags) <= set("div b table thead tbody tr th td".split())
    assert "".join(seen.texts).count(EVIL.replace("\u2028", "\\u2028")) == 1 + 12
    assert "and 8 more" in seen.texts
    assert "x" * 119 + "…" in seen.texts
    assert "none" not in seen.texts
    assert "<script>" not in shown
    long = Seen(text_html("\n".join(map(str, range(100)))))
    assert long.texts[0].endswith("39\n… and 60 more lines: print() shows them")


def test_a_plan_shows_itself_without_its_thousands_of_layouts():
    plan = Plan("tpu:v5p:4x4x4", (), (), {}, considered=1000, took=1.0)
    assert repr(plan) == "Plan(tpu:v5p:4x4x4: 0 of 1000 layouts fit)"


def shown_by(notebook, tmp_path):
    """What each cell of a notebook of the docs shows, in a process of its own."""
    if importlib.util.find_spec("IPython") is None:
        pytest.skip("IPython is not installed; it is in the extra `test`")
    places = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": places}
    command = [sys.executable, ROOT / "tests" / "_notebook.py", ROOT / "docs" / notebook]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("SHOWN ")[2])


@pytest.mark.slow
def test_the_notebook_on_another_mesh_runs(tmp_path):
    last = [cell[-1]["text/plain"] for cell in shown_by("another_mesh.ipynb", tmp_path) if cell]
    assert last[0].startswith("StepSpec(")
    assert last[1].startswith("ParityReport(")
    assert last[2:4] == ["40", "60"]
    assert last[4].startswith("History(")
    assert float(last[5]) < 2.0  # the variance of what it learns is 3.5


@pytest.mark.slow
def test_the_notebook_of_the_docs_runs_and_shows_each_value(tmp_path):
    cells = shown_by("tour.ipynb", tmp_path)
    last = [cell[-1] for cell in cells if cell]
    names = "MeshSpec Strategy StepSpec CompiledStep Report Ledger BySource Comparison ParityReport"
    assert [one["text/plain"].partition("(")[0] for one in last] == [*names.split(), "History"]
    for one in last:
        assert len(one["text/html"]) < FEW_KIB
    bars = [one["text/html"] for one in cells[-1] if "<progress" in one.get("text/html", "")]
    assert 'value="0" max="30"' in bars[0]
    assert 'value="30" max="30"' in bars[-1]
    assert not any("step  1/30" in one["text/plain"] for one in cells[-1])  # plain lines
