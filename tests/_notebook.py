"""Runs the cells of a notebook in IPython and prints what each shows: `_notebook.py tour.ipynb`.

IPython's own shell runs them, as a kernel's does, without the kernel's processes and sockets.
"""

import json
import sys

from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell


class ZMQInteractiveShell(InteractiveShell):
    """By this name libraries know a notebook from a terminal."""


def run(path):
    """For each code cell what it shows: `[[{mime type: text}], …]`; the first error ends it."""
    shell = ZMQInteractiveShell.instance()
    shell.display_pub = published = CapturingDisplayPublisher()
    shell.colors = "NoColor"
    shown = []
    for cell in json.load(open(path))["cells"]:
        if cell["cell_type"] != "code":
            continue
        published.outputs.clear()
        result = shell.run_cell("".join(cell["source"]))
        result.raise_error()
        value = result.result
        last = [] if value is None else [shell.display_formatter.format(value)[0]]
        shown.append([one["data"] for one in published.outputs] + last)
    return shown


if __name__ == "__main__":
    found = run(sys.argv[1])
    sys.__stdout__.write(f"\nSHOWN {json.dumps(found, default=str)}\n")
