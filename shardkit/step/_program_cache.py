"""A folder that keeps what was compiled, so that the same program is loaded the next time.

    .compiled/                   of `shardkit train`, beside its runs
      6f0c….saved                one executable each, a file as `step.save` writes it

The name of a file says what its executable was compiled from; see `_saved_programs`. Each file
appears whole, so several runs can share a folder: at worst two compile the same program at once.
"""

import contextlib
import dataclasses
import os
import pathlib
import time
import warnings

import jax
from jax.sharding import Mesh

from .._core.errors import Problem, SavedStepWarning, StepError, first_line, format_problems
from .._core.io._files import is_temporary, local_path
from ._jax_cache import without_jax_cache
from ._saved_programs import (
    KeptProgram,
    SavedPrograms,
    find_obstacle,
    name_program,
    read_program,
    save_programs,
)

# A step has about four programs, a sweep over settings some more. The least recently used go first.
_MOST = 64
# No file takes this long to write, in seconds.
_ABANDONED = 3600.0


@dataclasses.dataclass(frozen=True)
class ProgramCache:
    """A folder of executables."""

    folder: pathlib.Path  # made when something is kept
    mesh: Mesh  # devices and axes that the step is compiled for
    _told: set[str] = dataclasses.field(default_factory=set, init=False, compare=False)

    @classmethod
    def at(cls, folder: str | os.PathLike[str] | None, mesh: Mesh) -> "ProgramCache | None":
        """The cache in a folder; None, with a warning, where programs cannot be kept.

        Raises StepError for a URL, or what is no path at all.
        """
        if folder is None:
            return None
        cache = cls(local_path(folder, StepError, "What is compiled cannot be kept."), mesh)
        problem = find_obstacle(mesh)
        if problem is None:
            return cache
        cache._warn("What is compiled is not kept.", problem)
        return None

    def load(self, name: str, lowered: jax.stages.Lowered) -> KeptProgram | None:
        """Returns an executable; None if there is none to use.

        Whatever the file holds and whatever reading it raises, the program compiles then.
        """
        path = self._path(name)
        try:
            found = read_program(path, name, lowered, self.mesh)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # zipfile, zlib, pickle and XLA have no common error
            why = "cannot be read" if isinstance(error, OSError) else "is damaged"
            problem = Problem(path.name, f"{why}: {_describe(error)}")
            self._warn(f"A program compiles anew, since the one that was kept {why}.", problem)
            return None
        try:
            os.utime(path)
        except OSError:  # a folder that is read-only, or was pruned meanwhile
            pass
        return found

    def store(self, name: str, program: KeptProgram) -> None:
        """Keeps an executable; where that is not possible, warns and goes on."""
        headline = "What was compiled is not kept; the next run compiles again."
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_programs(self._path(name), {name: program}, self.mesh)
            self._prune()
        except OSError as error:
            why = "is not a folder" if isinstance(error, FileExistsError) else _describe(error)
            self._warn(headline, Problem(str(self.folder), f"cannot be written: {why}"))
        except StepError as error:
            cause = error.__cause__ or error
            subject = str(self.folder) if isinstance(cause, OSError) else "the program"
            self._warn(headline, Problem(subject, f"cannot be written: {_describe(cause)}"))

    def _path(self, name: str) -> pathlib.Path:
        return self.folder / f"{name}.saved"

    def _prune(self) -> None:
        """Deletes the least recently used files, and parts that a killed run has left.

        Another run may delete the same files meanwhile.
        """
        used, now = {}, time.time()
        for file in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                if file.name.endswith(".saved"):
                    used[file.path] = file.stat().st_mtime
                elif is_temporary(file.name) and now - file.stat().st_mtime > _ABANDONED:
                    os.unlink(file.path)
        for path in sorted(used, key=lambda path: used[path])[:-_MOST]:
            pathlib.Path(path).unlink(missing_ok=True)

    def _warn(self, headline: str, problem: Problem) -> None:
        """Warns once of each kind: a step has a dozen programs, and one full disk."""
        if headline in self._told:
            return
        self._told.add(headline)
        fix = f"remove {self.folder}, or another folder: --set compile.cache=FOLDER, or off"
        text = format_problems(headline, [problem], fix)
        warnings.warn(text, SavedStepWarning, stacklevel=2)


def _describe(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


def can_keep_programs(mesh: Mesh) -> bool:
    """Whether executables for a mesh can be kept."""
    return find_obstacle(mesh) is None


def load_or_compile(
    lowered: jax.stages.Lowered, mesh: Mesh, saved: SavedPrograms | ProgramCache | None = None
) -> jax.stages.Compiled:
    """Takes a program without options from where it may be saved, or compiles it."""
    name = name_program(lowered, {}, mesh) if saved else ""
    if saved and (found := saved.load(name, lowered)):
        return found.compiled
    with without_jax_cache(mesh):
        compiled = lowered.compile()
    if saved:
        saved.store(name, KeptProgram(compiled, ""))
    return compiled
