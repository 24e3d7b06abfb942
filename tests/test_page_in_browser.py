"""The page of a report in a real browser, at the widths of a phone and of a laptop.

Without a browser only the structure is checked. `apt-get install chromium` brings one.
"""

import html.parser
import json
import pathlib
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

from shardkit.report import Program, Report
from shardkit.report._saved import TickTable

from ._programs import recorded

_NAMES = ("chromium", "google-chrome", "chromium-browser")
BROWSER = next(filter(None, map(shutil.which, _NAMES)), None)
PROBE = pathlib.Path(__file__).parent / "data" / "probe.js"
ERRORS = """<script>window.errors = [];
addEventListener("error", (e) => window.errors.push(`error: ${e.message}`));
const say = console.error;
console.error = (...what) => { window.errors.push(`console: ${what.join(" ")}`); say(...what); };
</script>"""
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here to draw the page")


@pytest.fixture(scope="module")
def report():
    mesh = (("fsdp", 4), ("tensor", 4))
    text = recorded("tpu_v5p_fsdp_tensor")
    ticks = TickTable("pipe", "gpipe", (("F0", "F1", "", "B0", "B1"), ("", "F0", "F1", "B0", "B1")))
    return Report.of(Program(text, mesh, "tpu", "TPU v5p", ticks=(ticks,)))


def probe(page, width, tmp_path):
    """What the probe finds in a page that is drawn `width` pixels wide."""
    page = page.replace("<head>", f"<head>{ERRORS}")
    page = page.replace("</body>", f"<script>{PROBE.read_text()}</script></body>")
    file = tmp_path / "page.html"
    # A browser's own window has a smallest width; a frame has any.
    frame = f'<iframe width="{width}" height="900" style="border:0" srcdoc="{escape(page)}">'
    file.write_text(f"<!doctype html><meta charset=utf-8><body>{frame}</iframe>", "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    command = [BROWSER, *flags, "--window-size=1400,1000", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="probed">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1]))


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_screen_and_every_table_can_be_pressed(report, width, tmp_path):
    found = probe(report.to_html(), width, tmp_path)
    assert found["wrong"] == []
    assert found["width"] == width
    assert found["pressed"] >= 5


@needs_browser
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("td, p { width: 1ch !important; overflow-wrap: anywhere }", " lines for "),
        ("h2 { white-space: nowrap; width: 2000px }", "px wide on a screen of 390"),
    ],
)
def test_the_probe_sees_what_is_wrong(report, broken, said, tmp_path):
    page = report.to_html().replace("</style>", f"{broken}</style>")
    assert any(said in one for one in probe(page, 390, tmp_path)["wrong"])


@needs_browser
def test_the_probe_sees_an_error_of_a_script(report, tmp_path):
    page = report.to_html().replace("draw_flops();", "draw_flops(); undefined_name();")
    assert any("undefined_name" in one for one in probe(page, 390, tmp_path)["wrong"])


class Structure(html.parser.HTMLParser):
    """Elements that are opened and closed, and the ids of all."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.unclosed = [], [], []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unclosed.append(tag)


def test_the_page_is_well_formed_and_its_ids_are_unique(report):
    structure = Structure()
    structure.feed(report.to_html())
    assert (structure.open, structure.unclosed) == ([], [])
    assert len(set(structure.ids)) == len(structure.ids)
    assert {"subject", "made", "figures", "report"} <= set(structure.ids)
