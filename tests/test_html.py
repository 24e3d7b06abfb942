"""The page of a report: its data comes back whole, and nothing in it can run or be fetched."""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shardkit._core.tree import Leaf
from shardkit.report import Finding, Flops, Ledger, LedgerRow, Memory, PlacedLeaf, Report
from shardkit.report._saved import LeafLayout
from shardkit.report.time._timeline import Segment, Timeline

from ._programs import make_mesh

EVIL = "w<script>alert(1)</script>&\"'{{style}}\u2028"
NODE = shutil.which("node")

BROWSER = pathlib.Path(__file__).parent / "data" / "browser.js"


def row(**changes):
    plain = {
        "kind": "all-reduce", "axes": ("data",), "dtype": "f32", "payload_bytes": 1024,
        "wire_bytes": 1024, "trips": 1, "scope": "mlp", "phase": "backward", "overlapped": False,
        "group": 2, "full_axes": True, "operands": ("f32[256]",), "windowed": False,
        "conditional": False, "computation": "main", "name": "all-reduce.1",
        "op_name": "jit(f)/mlp",
    }  # fmt: skip
    return LedgerRow(**plain | changes)


def report(rows=None, **changes):
    mesh = changes.pop("mesh", (("data", 2), ("tensor", 4)))
    rows = [row(), row(axes=("tensor",), kind="all-gather")] if rows is None else rows
    split = LeafLayout(
        "params", "up", (8, 32), "f32", ("embed", "mlp"), ((), ("tensor",)), (8, 8), 256, False
    )
    copied = LeafLayout("params", EVIL, (8, 4), "f32", None, ((), ()), (8, 4), 128, False)
    finding = Finding(
        "replicated",
        leaf=f"params/{EVIL}",
        axes=("data",),
        bytes=128,
        why=f"why {EVIL}",
        fix="fix()",
    )
    plain = {
        "mesh": mesh, "platform": "cpu", "device_kind": "cpu", "ledger": Ledger(tuple(rows), mesh),
        "memory": Memory(384, 768, 0, 64, 12, 0, 4, 2048, 3280, None),
        "flops": Flops(2000, 500, {("mlp", "forward"): 2000, ("", "recompute"): 500}),
        "findings": (finding,), "leaves": (split, copied),
    }  # fmt: skip
    return Report(**plain | changes)


def embedded(page):
    """The text of the JSON in a page: up to the first end of a script, as a browser reads it."""
    return re.search(r'<script type="application/json" id="report">(.*?)</script', page, re.S)[1]


def shown(report, after="", of="main"):
    """Text of an element after the page drew itself in node, and after more was done to it."""
    if NODE is None:
        pytest.skip("node is not here to run the page's script")
    script = (
        f"{BROWSER.read_text()}\n{after}\nconsole.log(document.querySelector({of!r}).textContent)"
    )
    page = report.to_html()
    done = subprocess.run([NODE, "-e", script], input=page, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_json_with_layouts_comes_back_whole():
    assert Report.from_json(report().to_json()) == report()


def test_a_report_saved_without_layouts_opens():
    fields = json.loads(report().to_json())
    del fields["leaves"]
    assert Report.from_json(json.dumps(fields)) == dataclasses.replace(report(), leaves=())


def test_the_page_holds_the_report():
    assert Report.from_json(embedded(report().to_html())) == report()


def test_a_name_cannot_end_the_script_that_holds_it():
    page = report().to_html()
    assert page.count("</script") == 2
    assert "<script>alert" not in page
    assert "{{style}}" in embedded(page)


def test_nothing_is_fetched():
    page = report().to_html()
    assert not re.findall(r"https?:|//[a-z]+\.|@import|url\(|\bfetch\(|XMLHttpRequest", page)
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,"]


def test_no_text_is_parsed_as_html():
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write", report().to_html())


def test_the_page_without_its_data_is_small():
    page = report().to_html()
    assert len(page) - len(embedded(page)) < 64 * 1024


def test_names_are_shown_as_they_are():
    assert EVIL in shown(report())


def test_what_could_not_be_read_comes_first():
    cut = dataclasses.replace(report().ledger, problems=("the text ends in a computation",))
    text = shown(report(ledger=cut))
    assert text.index("Incomplete") < text.index("Findings")
    assert "the text ends in a computation" in text
    assert "at least 2.00 KiB" in text
    assert "Incomplete" not in shown(report())


def test_unmeant_copies_are_marked_and_meant_ones_are_not():
    after = 'const count = document.querySelectorAll ? 0 : body.querySelectorAll(".copied").length;'
    pick = (
        f"press(body.querySelectorAll('.pick').find((b) => b.textContent === {json.dumps(EVIL)}));"
    )
    marked = pick + after + 'body.querySelector("nav").textContent = `${count} marked`;'
    # Eight devices and one block of the array.
    assert shown(report(), marked, "nav").strip() == "9 marked"
    meant = tuple(dataclasses.replace(leaf, declared_replicated=True) for leaf in report().leaves)
    assert shown(report(leaves=meant), marked, "nav").strip() == "0 marked"


@pytest.mark.parametrize(
    "spec",
    [
        P(("tensor", "data"), None, "pipe"),
        P("pipe", "tensor", "data"),
        P(None, ("data", "pipe", "tensor")),
        P("data"),
    ],
    ids=str,
)
def test_every_device_holds_what_jax_puts_there(spec):
    sizes, shape = {"data": 2, "pipe": 2, "tensor": 2}, (8, 24, 4)
    mesh = make_mesh(**sizes)
    placed = PlacedLeaf("params", Leaf("w", shape, np.dtype("float32")), spec)
    leaf = placed.layout(sizes)
    after = """
    const held = body.querySelectorAll("button.device").map((node) => node.dataset.text);
    body.querySelector("nav").textContent = held.join("\\n");
    """
    made = report(mesh=tuple(sizes.items()), leaves=(leaf,), rows=[], findings=())
    said = [
        re.findall(r"Device (\d+) .*\[(.*)\]", line)
        for line in shown(made, after, "nav").split("\n")
    ]
    held = {int(number): text for ((number, text),) in filter(None, said)}
    truth = NamedSharding(mesh, spec).devices_indices_map(shape)
    assert held == {device.id: written(truth[device], shape) for device in mesh.devices.flat}


def written(index, shape):
    """An index of slices as numpy users write it."""
    whole = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    return ", ".join(
        ":" if (start, stop) == (0, size) else f"{start}:{stop}"
        for (start, stop), size in zip(whole, shape, strict=True)
    )


def test_a_pod_is_abbreviated():
    pod = (("pipe", 4), ("fsdp", 384), ("tensor", 4))
    leaf = LeafLayout(
        "params", "w", (768, 8), "f32", None, (("fsdp",), ("tensor",)), (2, 2), 16, False
    )
    after = """
    const held = body.querySelectorAll("button.device");
    body.querySelector("nav").textContent = `${held.length} ${held.at(-1).dataset.text}`;
    """
    text = shown(report(mesh=pod, leaves=(leaf,), rows=[]), after, "nav")
    number, last = text.strip().split(" ", 1)
    assert int(number) < 150
    expected = "Device 6,143 (pipe 3, fsdp 383, tensor 3) holds shard 1,535, [766:768, 6:8]"
    assert last == expected


def test_the_ledger_filters_and_sorts():
    rows = [
        row(wire_bytes=n, scope=f"layer{n}", axes=(("data", "tensor")[n % 2],)) for n in range(9)
    ]
    filtered = "change(find('ledger').querySelectorAll('select')[0], 'tensor');"
    assert "4 of 9 collectives, 16 B of 36 B sent" in shown(report(rows), filtered)
    searched = "change(find('ledger').querySelectorAll('input')[0], 'LAYER7');"
    assert "1 of 9 collectives, 7 B of 36 B sent" in shown(report(rows), searched)
    order = """
    press(find("ledger").querySelectorAll("th")[8].children[0]);
    const scopes = find("ledger").querySelectorAll("td").filter((_, i) => i % 10 === 8);
    body.querySelector("nav").textContent = scopes.map((one) => one.textContent).join(" ");
    """
    assert shown(report(rows), order, "nav").split() == [f"layer{n}" for n in range(9)]


def test_a_large_ledger_is_drawn_in_parts():
    rows = [row(wire_bytes=n, name=f"all-reduce.{n}") for n in range(5000)]
    count = "body.querySelector('nav').textContent = find('ledger').querySelectorAll('tr').length;"
    more = "press(find('ledger').querySelector('.more'));"
    assert shown(report(rows), count, "nav").strip() == "201"
    assert shown(report(rows), more + count, "nav").strip() == "401"
    assert "Show 200 more of 4,800" in shown(report(rows))


def test_many_scopes_of_one_collective_are_abbreviated_until_it_is_opened():
    scopes = [f"decoder/layer_{n}" for n in range(100)]
    made = report([row(scope=", ".join(scopes))], mesh=(("data", 8),), leaves=())
    text = shown(made)
    assert "decoder/layer_0 and 99 more" in text
    assert scopes[99] not in text
    assert "over 1 mesh axis" in text
    after = "press(find('ledger').querySelector('.opener'));"
    assert scopes[99] in shown(made, after)
    assert len(str(made).splitlines()) < 40


def test_a_row_opens_its_details():
    after = "press(find('ledger').querySelector('.opener'));"
    assert "all-reduce.1 in main" in shown(report(), after)


def test_a_device_of_unknown_speed_has_no_time():
    assert "No time is modelled" in shown(report())


def timeline(**changes):
    segments = (
        Segment("forward", "mlp", "compute", (), 2e-3, 2e-3),
        Segment("backward", "mlp", "communication", ("data",), 1e-3, 0.25e-3),
    )
    plain = {
        "chip": "v5p", "source": "schedule", "compute": 2e-3, "products": 1e-3, "memory": None,
        "communication": {"data": 1e-3}, "exposed": 0.25e-3, "low": 2.25e-3, "high": 2.25e-3,
        "mfu": 0.4, "best_mfu": 0.4, "segments": segments, "assumptions": (f"assumed {EVIL}",),
    }  # fmt: skip
    return Timeline(**plain | changes)


def test_a_schedule_shows_what_nothing_hides():
    text = shown(report(timeline=timeline()))
    assert "2.25 ms| on v5p, from the compiler's schedule: 2 ms of compute" in text
    assert "250 µs of communication that no compute hides; MFU 40.0 %" in text
    assert "Communication over: data 1 ms (250 µs exposed)" in text
    assert f"assumed {EVIL}" in text


def test_blocks_are_as_wide_as_their_share_of_the_step():
    after = """
    const drawn = find("timeline").querySelectorAll(".track").flatMap((one) => one.children);
    body.querySelector("nav").textContent = drawn.filter((one) => one.styles.width)
      .map((one) => [one.attributes.class, one.styles.left, one.styles.width].join(" ")).join(", ");
    """
    drawn = shown(report(timeline=timeline()), after, "nav").strip()
    blocks = {kind: (left, width) for _, kind, left, width in map(str.split, drawn.split(", "))}
    # Of 2.25 ms the product takes 2, and 0.75 of the reduction lie under its end.
    ends = {kind: [float(x[:-1]) * 2.25e-2 for x in at] for kind, at in blocks.items()}
    assert ends["forward"] == pytest.approx([0, 2])
    assert ends["hides"] == pytest.approx([1.25, 0.75])
    assert ends["exposed"] == pytest.approx([2, 0.25])


def test_a_roofline_shows_both_its_ends_and_what_it_lacks():
    made = timeline(
        source="roofline", memory=3e-3, low=3e-3, high=6e-3, best_mfu=0.8, problems=("loop x",)
    )
    text = shown(report(timeline=made))
    assert "3 ms to 6 ms| on v5p, as a roofline" in text
    assert "MFU 40.0 % to 80.0 %" in text
    assert "Lower bound: loop x" in text
