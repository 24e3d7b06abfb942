"""Files of pictures, refused before the work that would be drawn."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ._errors import ConfigError, Problem, did_you_mean, format_problems, raise_all

_HEADLINE = "The picture cannot be made."


def check_picture(
    out: Path, suffixes: Sequence[str] = (".png", ".svg"), code: str = "--out {}"
) -> None:
    """Refuses a file that no picture can be written to.

    Args:
      out: the file.
      suffixes: kinds of files that can be drawn.
      code: how a file is named, for the fix, with a pair of braces in its place.

    Raises:
      ConfigError: the suffix is of another kind, the folder is not there, or matplotlib is not
        installed; with all of these at once.

    >>> check_picture(Path("front.png"))
    """
    problems = []
    if out.suffix not in suffixes:
        what = f"the suffix {out.suffix!r}" if out.suffix else "no suffix"
        why = f"has {what}; known: {', '.join(suffixes)}.{did_you_mean(out.suffix, suffixes)}"
        fix = code.format(out.with_suffix(suffixes[0]))
        problems.append(Problem(str(out), why, fix))
    if not out.parent.is_dir():
        why = f"No such file or directory. There is no folder {out.parent}."
        problems.append(Problem(str(out), why, code.format(f"plot{suffixes[0]}")))
    if importlib.util.find_spec("matplotlib") is None:
        why = "is drawn by the package matplotlib, which is not installed."
        problems.append(Problem(str(out), why, "pip install 'shardkit[plot]'"))
    raise_all(ConfigError, _HEADLINE, problems)


def unwritable(out: Path, error: OSError, code: str = "--out {}") -> ConfigError:
    """The same error for a file that turned out not to be writable."""
    fix = code.format(f"plot{out.suffix}")
    return ConfigError(format_problems(_HEADLINE, [Problem(str(out), f"{error.strerror}.", fix)]))
