"""Files of a sweep: whole or not there, and what the system refuses told with the file's name."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .._errors import Problem, SweepError, format_problems


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tells what the system refuses inside of the block, and what is kept nevertheless.

    Raises:
      SweepError: in place of any `OSError`.
    """
    try:
        yield
    except OSError as error:
        problem = Problem(str(path), f"{error.strerror or error}")
        fix = "room and rights for the folder, then the same call: it goes on behind the last row"
        headline = "The sweep cannot write its files; every row before is kept."
        raise SweepError(format_problems(headline, [problem], fix)) from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a path to write to; the file takes its name at the end of the block, or is gone."""
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
