"""Files that commands write: refused before the work, whole or not there behind it."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from .._errors import ConfigError, Problem, format_problems, raise_all


def check_outputs(given: Mapping[str, str | None], name: str = "report") -> None:
    """Refuses files that cannot be written, before minutes of compiling.

    Args:
      given: option → file; None where the option is not given, `-` for the terminal.
      name: of a file, for the fix.

    Raises:
      ConfigError: with every one of them.
    """
    problems = []
    for option, file in given.items():
        if not file or file == "-":
            continue
        path = Path(file).absolute()
        above = next((parent for parent in path.parents if parent.exists()), path)
        if path.is_dir():
            why = "is a folder, not a file"
        elif not above.is_dir() or not os.access(above, os.W_OK):
            why = f"cannot be written: {above} is no folder that this user may write to"
        else:
            continue
        problems.append(Problem(f"{option} {file}", why, f"{option} {name}.{option[2:]}"))
    raise_all(ConfigError, f"The {name} could not be saved.", problems)


def write_output(path: Path, text: str) -> None:
    """Writes a file, or prints what would be in `-`.

    Raises:
      ConfigError: the system refuses, and nothing of the file is there.
    """
    if str(path) == "-":
        print(text)
        return
    whole = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text(text)
        whole.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            whole.unlink(missing_ok=True)
        problem = Problem(str(path), f"{error.strerror}.", "a folder with room and rights")
        headline = "A file could not be written."
        raise ConfigError(format_problems(headline, [problem])) from error
