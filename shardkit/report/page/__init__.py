"""Writes a report as one HTML page that holds its data, style and scripts, for use offline."""

import re
from importlib.resources import files

from .._data import ReportData
from .._json import to_json

# Later scripts use what earlier ones define.
_SCRIPTS = tuple(
    """base table head findings timeline pipeline history memory traffic sources mesh layout leaves
    ledger flops main""".split()
)
# No text of a script goes over several lines, so that indentation has no meaning.
_AROUND = re.compile(r"\s*([{};,])\s*")
_UNREAD = re.compile(r"^[ \t]+|^[ \t]*//.*\n", re.MULTILINE)


def to_html(report: ReportData) -> str:
    """Returns the page of a report, as text of a `.html` file."""
    # JSON has `<` in strings only. Escaped, no name such as `</script>` ends the script element.
    data = to_json(report, indent=None).replace("<", "\\u003c")
    parts = {
        "style": _read_asset("page.css"),
        "report": data,
        "script": "".join(_read_asset(f"{name}.js") for name in _SCRIPTS),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read_asset("page.html"))


def _read_asset(name: str) -> str:
    """Text of a file; of scripts and styles without what only their authors read."""
    text = files(__name__).joinpath(name).read_text("utf-8")
    if name.endswith(".css"):
        return _AROUND.sub(r"\1", text)
    return _UNREAD.sub("", text) if name.endswith(".js") else text
