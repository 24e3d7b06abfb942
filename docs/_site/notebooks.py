"""Makes a page of each notebook: its cells, run, and what they show. A hook of MkDocs."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

_RUNNER = Path(__file__).parents[2] / "tests" / "_notebook.py"
_LINK = re.compile(r"\]\((\w+)\.ipynb\)")


def on_config(config: Any) -> Any:
    """The navigation has the pages, of which MkDocs knows when it has read the files."""
    config.nav = json.loads(json.dumps(config.nav).replace(".ipynb", ".md"))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages; the notebooks stay files, to be taken along."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = file.src_uri.removesuffix("ipynb") + "md"
        content = "\n\n".join(_page(Path(file.abs_src_path)))
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to notebooks lead to their pages, but for that of the page itself."""
    return markdown if page.file.generated_by else _LINK.sub(r"](\1.md)", markdown)


def _page(notebook: Path) -> Iterator[str]:
    cells = json.loads(notebook.read_text())["cells"]
    shown = iter(_run(notebook))
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source
        else:
            yield f"```python\n{source}\n```"
            # Of a display that is updated, as a progress bar, the last state.
            yield from map(_show, next(shown)[-1:])
        if number == 0:
            yield f"[The notebook]({notebook.name}), run where this page was made."


def _run(notebook: Path) -> list[list[dict[str, str]]]:
    """For each code cell what it shows, by mime type."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"IPYTHONDIR": folder}
        command = [sys.executable, str(_RUNNER), str(notebook)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        raise RuntimeError(
            f"{notebook.name} does not run: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.rpartition("SHOWN ")[2])


def _show(value: dict[str, str]) -> str:
    if "text/html" in value:
        return f'<div class="shown">\n{value["text/html"]}\n</div>'
    return f"```text\n{value.get('text/plain', '')}\n```"
