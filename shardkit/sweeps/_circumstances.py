"""When, from what code and with which versions a row was made."""

import subprocess
import time
from typing import Any

from ..run import package_versions


def read_provenance() -> dict[str, Any]:
    """Commit of the working folder (None outside of a checkout), date and versions."""
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"commit": _git_commit(), "date": date, "versions": package_versions()}


def _git_commit() -> str | None:
    """Short hash of what is checked out, `-dirty` behind it where files were changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        said = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:  # there is no git
        return None
    return said.stdout.strip() if said.returncode == 0 else None
