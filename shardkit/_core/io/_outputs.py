"""Output files that a user names: checked before the work starts, written at its end."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..errors import ConfigError, Problem, did_you_mean, raise_all
from ._files import local_path, os_errors_as, path_problem, write_atomic

_HEADLINE = "The figure cannot be saved."


def check_figure_path(
    path: Path, suffixes: Sequence[str] = (".png", ".svg"), code: str = "--out {}"
) -> None:
    """Checks that a figure can be drawn and its file written; one ConfigError lists what is wrong.

    That is an unknown format, a missing folder, or that matplotlib is not installed. In its fix the
    file stands in place of `{}` in `code`.

    >>> check_figure_path(Path("front.png"))
    """
    problems = [url] if (url := path_problem(path)) else []
    path = path.expanduser()
    if path.suffix not in suffixes:
        what = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        why = f"has {what}; known: {', '.join(suffixes)}.{did_you_mean(path.suffix, suffixes)}"
        problems.append(Problem(str(path), why, code.format(path.with_suffix(suffixes[0]))))
    if not path.parent.is_dir():
        why = f"No such file or directory: there is no folder {path.parent}."
        problems.append(Problem(str(path), why, code.format(f"plot{suffixes[0]}")))
    if importlib.util.find_spec("matplotlib") is None:
        why = "needs the package matplotlib, which is not installed."
        problems.append(Problem(str(path), why, "pip install 'shardkit[plot]'"))
    raise_all(ConfigError, _HEADLINE, problems)


@contextlib.contextmanager
def figure_file(path: Path, code: str = "--out {}") -> Iterator[Path]:
    """Yields a path to draw to, which is renamed to `path` when the block ends.

    The path is accepted by `check_figure_path`. Raises ConfigError if it cannot be written.
    """
    fix, path = code.format(f"plot{path.suffix}"), path.expanduser()
    with os_errors_as(ConfigError, _HEADLINE, path, fix), write_atomic(path) as temporary:
        yield temporary


def check_outputs(options: Mapping[str, str | None], name: str = "report") -> None:
    """Raises ConfigError with the file of every option that cannot be written.

    Options may be None for an absent one, `-` for standard output. Files in the fix have the stem
    `name`.
    """
    problems = []
    for option, file in options.items():
        if not file or file == "-":
            continue
        if url := path_problem(file, f"{option} {file}"):
            problems.append(url)
            continue
        path = Path(file).expanduser().absolute()
        existing = next((parent for parent in path.parents if parent.exists()), path)
        if path.is_dir():
            why = "is a folder, not a file"
        elif not existing.is_dir() or not os.access(existing, os.W_OK):
            why = f"cannot be written: {existing} is not a folder that this user may write to"
        else:
            continue
        problems.append(Problem(f"{option} {file}", why, f"{option} {name}.{option[2:]}"))
    raise_all(ConfigError, f"The {name} cannot be saved.", problems)


def write_output(path: Path, text: str) -> None:
    """Writes a text file and its parent folders, or prints the text if the path is `-`.

    Raises:
      ConfigError: the write failed, and the file is absent or unchanged.
    """
    if str(path) == "-":
        print(text)
        return
    path = local_path(path, ConfigError, "A file cannot be written.")
    fix = "a folder with free space, and permission to write there"
    with os_errors_as(ConfigError, "A file cannot be written.", path, fix):
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomic(path) as temporary:
            temporary.write_text(text, "utf-8")
