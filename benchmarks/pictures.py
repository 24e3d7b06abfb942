"""Pictures of docs/pictures, drawn from what shardkit itself says: specs, schedules, a timeline.

    python benchmarks/pictures.py
    shardkit report llama2_7b --html page.html && python benchmarks/pictures.py page.html

The second line takes a picture of a page, in Chromium. A test compares the other committed files
with what this draws. Nothing is measured here.
"""

import pathlib
import subprocess
import sys
from collections.abc import Sequence

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shardkit as sk
from shardkit._core.io._palette import axis_colors
from shardkit.parallel.pipeline._schedule import schedule
from shardkit.rules._rule import Chain

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "pictures"
WHOLE, INK, FAINT, BACKWARD = "#9aa3ab", "#1f2328", "#e4e7ea", "#d9822b"
AXES = ("data", "fsdp", "tensor", "context", "pipe", "expert")


class Drawing:
    """An SVG file: boxes and words on white."""

    def __init__(self, width: int, height: int, title: str) -> None:
        """Starts with a title, which screen readers say."""
        size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" '
            'font-family="system-ui, sans-serif" font-size="13">',
            f"<title>{title}</title>",
            f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """Draws a filled rectangle."""
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.parts.append(f'<rect {place} fill="{fill}" stroke="#ffffff" stroke-width="1"/>')

    def word(self, x: float, y: float, text: str, fill: str = INK, anchor: str = "start") -> None:
        """Writes a line of text."""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{fill}" text-anchor="{anchor}">{text}</text>'
        )

    def array(self, x: float, y: float, size: int, spec: P, rank: int) -> None:
        """Draws an array of two dims, split by a spec over four devices.

        Args:
          x: of its left edge.
          y: of its upper edge.
          size: of its edges.
          spec: what splits its dims.
          rank: number of dims.
        """
        names = [*spec, *(None,) * (rank - len(spec))]
        split = [(dim, name) for dim, name in enumerate(names) if name]
        if not split:
            self.box(x, y, size, size, WHOLE)
            return
        ((dim, name),) = split
        axis = name if isinstance(name, str) else name[0]
        for i in range(4):
            fill, step = axis_colors(AXES)[axis], size / 4
            if dim == 0:
                self.box(x, y + i * step, size, step, fill)
            else:
                self.box(x + i * step, y, step, size, fill)

    def text(self) -> str:
        """Returns the file."""
        return "\n".join([*self.parts, "</svg>", ""])


def draw_mesh() -> str:
    """The mesh data=2 x tensor=4, and which part of three arrays each device holds."""
    mesh = sk.MeshSpec(data=2, tensor=4).build(devices=jax.devices()[:8])
    arrays = {"up": (P(None, "tensor"), (8, 8)), "down": (P("tensor"), (8, 8))}
    arrays["batch"] = (P("data"), (8, 8))
    drawing = Drawing(704, 306, "Eight devices, and the part of each array that a device holds")
    colors = axis_colors(AXES)
    for column in range(4):
        drawing.word(150 + 150 * column, 28, f"tensor {column}", colors["tensor"], "middle")
    for row in range(2):
        top = 42 + 118 * row
        drawing.word(16, top + 56, f"data {row}", colors["data"])
        for column in range(4):
            left = 82 + 150 * column
            drawing.box(left, top, 140, 106, "#f6f7f8")
            device = mesh.devices[row, column]
            drawing.word(left + 70, top + 20, f"device {device.id}", anchor="middle")
            for i, (name, (spec, shape)) in enumerate(arrays.items()):
                x, y, cell = left + 8 + 44 * i, top + 38, 36 / 8
                (axis,) = {axis for axis in spec if axis}
                drawing.box(x, y, 36, 36, FAINT)
                held = NamedSharding(mesh, spec).devices_indices_map(shape)[device]
                (y0, y1, _), (x0, x1, _) = (s.indices(n) for s, n in zip(held, shape, strict=True))
                drawing.box(
                    x + x0 * cell, y + y0 * cell, (x1 - x0) * cell, (y1 - y0) * cell, colors[axis]
                )
                drawing.word(x + 18, top + 92, name, anchor="middle")
    drawing.word(82, 296, "up: P(None, 'tensor')   down: P('tensor')   batch: P('data')")
    return drawing.text()


GREY = "grey: whole on each device. Strips: one on each of the four devices."
# What a picture of a kind shows: the names of the dims of each array.
COLUMNS = {
    "rows ×length": ("batch", "residual_length", "embed"),
    "rows ×mlp": ("batch", "mlp"),
    "W up": ("embed", "mlp"),
    "W down": ("mlp", "embed"),
    "moments": ("embed", "mlp"),
    "layers": ("layers", "embed"),
    "experts": ("experts", "embed"),
}


def ready() -> dict[str, sk.Strategy]:
    """The ready strategies, by what a user types."""
    made = sk.strategies
    return {
        "data()": made.data(),
        "zero()": made.zero(),
        "fsdp()": made.fsdp(),
        "tensor()": made.tensor(),
        "tensor(sequence=True)": made.tensor(sequence=True),
        "context()": made.context(),
        "pipeline()": made.pipeline(micro_batches=4),
        "expert()": made.expert(),
    }


def spec_of(strategy: sk.Strategy, column: str) -> P:
    """What a strategy says of the array of a column."""
    names = COLUMNS[column]
    table = strategy.activations if "rows" in column else strategy.params
    table = table.rules[0] if isinstance(table, Chain) else table
    spec = table.spec(names) if isinstance(table, sk.AxisRules) else P()
    if column == "moments":
        splits = [kind.axis for kind in strategy.kinds if "optimizer_state" in kind.splits]
        spec = P(splits[0]) if splits and not any(spec) else spec
    return spec


def draw_kinds() -> str:
    """What each kind of parallelism splits over four devices."""
    height = 54 + 54 * len(ready())
    drawing = Drawing(612, height + 24, "What each strategy splits over four devices")
    for i, column in enumerate(COLUMNS):
        for line, words in enumerate(column.split(" ", 1)):
            drawing.word(200 + 62 * i, 20 + 16 * line, words, anchor="middle")
    for row, (name, strategy) in enumerate(ready().items()):
        top = 48 + 54 * row
        drawing.word(12, top + 27, name)
        for i, column in enumerate(COLUMNS):
            drawing.array(178 + 62 * i, top, 44, spec_of(strategy, column), 2)
    drawing.word(12, height + 10, GREY)
    return drawing.text()


def draw_ticks() -> str:
    """Two schedules of a pipeline of four stages and eight micro-batches."""
    tables = [schedule(name, stages=4, micro_batches=8) for name in ("gpipe", "1f1b")]
    longest = max(len(str(table).splitlines()[0].split()) - 2 for table in tables)
    drawing = Drawing(96 + 26 * longest, 2 * 160 + 20, "Ticks of two pipeline schedules")
    for at, table in enumerate(tables):
        top = 26 + 160 * at
        bubble = f"bubble {float(table.bubble):.0%}"
        drawing.word(14, top, f"{table.name}, 4 stages, 8 micro-batches: {bubble}")
        for stage, line in enumerate(str(table).splitlines()):
            drawing.word(14, top + 28 + 28 * stage, f"stage {stage}")
            for tick, action in enumerate(line.split()[2:]):
                fill = {"F": axis_colors(AXES)["pipe"], "B": BACKWARD}.get(action[0], FAINT)
                x, y = 78 + 26 * tick, top + 10 + 28 * stage
                drawing.box(x, y, 26, 26, fill)
                if action[0] in "FB":
                    drawing.word(x + 13, y + 18, action, "#ffffff", "middle")
    return drawing.text()


def draw_timeline() -> str:
    """The modelled step of a recorded TPU program: where the compiler put its collectives."""
    sys.path.insert(0, str(ROOT))
    from shardkit.report import Program, Report
    from tests._programs import recorded

    mesh = (("fsdp", 4), ("tensor", 4))
    report = Report.of(Program(recorded("tpu_v5p_fsdp_tensor"), mesh, "tpu", "TPU v5p"))
    timeline = report.timeline
    blocks: Sequence = timeline.blocks()
    total = max(block.start + block.seconds for block in blocks)
    drawing = Drawing(596, 170, "Modelled timeline of one step")
    drawing.word(14, 24, f"one step on a TPU v5p, modelled: {total * 1e3:.3g} ms")
    lanes = {"compute": 44, "communication": 92}
    for lane, top in lanes.items():
        drawing.word(14, top + 24, lane)
    colors = {"compute": WHOLE, **axis_colors(AXES)}
    for block in blocks:
        kind = block.segment.kind
        name = block.segment.axes[0] if kind == "communication" else "compute"
        x, width = 128 + 452 * block.start / total, max(0.5, 452 * block.seconds / total)
        drawing.box(x, lanes[kind], round(width, 2), 36, colors[name])
    for i, name in enumerate(("compute", "fsdp", "tensor")):
        drawing.box(128 + 110 * i, 142, 12, 12, colors[name])
        drawing.word(146 + 110 * i, 153, name)
    return drawing.text()


def pictures() -> dict[str, str]:
    """File name to text, of those that need no report."""
    return {"mesh.svg": draw_mesh(), "kinds.svg": draw_kinds(), "ticks.svg": draw_ticks()}


def photograph(page: pathlib.Path) -> None:
    """Takes report.png of the page of a report, down to its memory over the step."""
    from PIL import Image

    file = FOLDER / "report.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    shot = ["--window-size=1180,1236", f"--screenshot={file}", page.absolute().as_uri()]
    subprocess.run(["chromium", *flags, *shot], check=True, capture_output=True)
    Image.open(file).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    """Writes the files."""
    if sys.argv[1:]:
        photograph(pathlib.Path(sys.argv[1]))
        return
    sk.simulate_devices(8)
    FOLDER.mkdir(exist_ok=True)
    for name, text in {**pictures(), "timeline.svg": draw_timeline()}.items():
        (FOLDER / name).write_text(text)
        print(FOLDER / name, len(text))


if __name__ == "__main__":
    main()
