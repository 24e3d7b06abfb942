"""Puts a report into one page that shows it without a network: its data, style and scripts."""

import re
from importlib.resources import files

# Later scripts use what earlier ones define.
_SCRIPTS = tuple(
    "base table head findings timeline memory traffic mesh layout leaves ledger flops main".split()
)


def page(json: str) -> str:
    """Returns the page of a report.

    Args:
      json: the report as JSON.
    """
    # In JSON `<` stands only inside strings. Spelled so, no name can end the script that holds it.
    data = json.replace("<", "\\u003c")
    parts = {
        "style": _part("page.css"),
        "report": data,
        "script": "".join(_part(f"{name}.js") for name in _SCRIPTS),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _part("page.html"))


def _part(name: str) -> str:
    return files("shardkit.report").joinpath("page", name).read_text("utf-8")
