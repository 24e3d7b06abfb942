"""The package keeps the rules of the house, and each rule's check catches a violation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardkit.parallel import known_kinds

from ._architecture import (
    KINDS,
    Tree,
    cycles,
    floor_violations,
    hidden_modules,
    import_counts,
    lazy_mismatches,
    named_kinds,
    named_mesh_axes,
    positional_calls,
    private_jax,
    probing,
    same_names,
    size_violations,
    small_files,
    unannotated,
    undocumented,
)
from ._kept import unlisted_state

ROOT = Path(__file__).parent.parent
HOUSE = Tree(ROOT, ROOT / "docs" / "architecture.md")  # read and parsed once for all rules
PAGE = """
| floor | module | one line |
|---|---|---|
| 0 | `_errors`, `_tree` | low |
| 1 | `mesh/` | middle |
| 4 | `models/` | high |
| 4 | `lm/` | high |
| side | `inspect/` | beside |
| roof | `verify/` `cli` | top |
"""
LAZY = '''"""A part."""
if TYPE_CHECKING:
    from {typed} import g as g
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, {{"g": "{home}"}})
'''
CHECKS = (
    floor_violations,
    cycles,
    import_counts,
    size_violations,
    small_files,
    same_names,
    positional_calls,
    hidden_modules,
    private_jax,
    probing,
    named_mesh_axes,
    named_kinds,
    undocumented,
    unannotated,
    unlisted_state,
    lazy_mismatches,
)

LONG = "\n" * 30  # so that a file of a fake tree is not too small

# check, {file: source}, what the violation must say
VIOLATIONS = [
    (
        floor_violations,
        {"mesh/_spec.py": "from ..models import _decoder", "models/_decoder.py": ""},
        "mesh/_spec.py:1 imports shardkit.models._decoder, which is not below it",
    ),
    (
        floor_violations,
        {"mesh/_spec.py": "def f() -> None:\n    from ..models._decoder import x"},
        "mesh/_spec.py:2 imports shardkit.models._decoder, which is not below it",
    ),
    (
        floor_violations,
        {"inspect/_hlo.py": "import shardkit.models"},
        "inspect/_hlo.py:1 imports shardkit.models, which is not below it",
    ),
    (
        floor_violations,
        {"mesh/_spec.py": "from .. import cli"},
        "mesh/_spec.py:1 imports shardkit.cli, which is not below it",
    ),
    (
        floor_violations,
        {"mesh/_spec.py": "import shardkit"},
        "mesh/_spec.py:1 imports shardkit itself",
    ),
    (floor_violations, {"cellar/_wine.py": ""}, "cellar is not in the table of page.md"),
    (
        cycles,
        {"mesh/_a.py": "from ._b import x", "mesh/_b.py": "from . import _a"},
        "shardkit.mesh._a -> shardkit.mesh._b -> shardkit.mesh._a",
    ),
    (
        import_counts,
        {"cli.py": "from .mesh import " + ", ".join(f"_m{i}" for i in range(11))}
        | {f"mesh/_m{i}.py": "" for i in range(11)},
        "cli.py:1 imports 11 modules of the package, not 10",
    ),
    (size_violations, {"cli.py": "x = 1\n" * 401}, "cli.py:1 has 401 lines, not 400"),
    (
        size_violations,
        {"cli.py": "def f() -> None:\n" + "    x = 1\n" * 60},
        "cli.py:1 f has 61 lines, not 60",
    ),
    (size_violations, {"cli.py": "x = " + "1" * 97}, "cli.py:1 has 101 columns, not 100"),
    (small_files, {"mesh/_spec.py": ""}, "mesh/_spec.py:1 has 0 lines, fewer than 30"),
    (
        small_files,
        {"mesh/_spec.py": "x = 1\n" * 29},
        "mesh/_spec.py:1 has 29 lines, fewer than 30",
    ),
    (
        same_names,
        {"cli.py": "class Row: ...", "models/_decoder.py": "class Row: ..."},
        "cli.py:1 and shardkit/models/_decoder.py:1 define a class Row each",
    ),
    (
        positional_calls,
        {"cli.py": "f(1, 2, 3, 4, 5)\nf(1, 2, 3, 4, 5, *x)\nA.f(1, 2, 3, 4, 5, 6)"},
        "cli.py:3 calls A.f with 6 positional arguments",
    ),
    (
        hidden_modules,
        {"mesh/f.py": LONG},
        "mesh/__init__.py:1 hides its module f behind a name",
    ),
    (
        hidden_modules,
        {"models/__init__.py": LAZY.format(home="._decoder", typed="._decoder"), "models/g.py": ""},
        "models/__init__.py:1 hides its module g behind a name",
    ),
    (private_jax, {"cli.py": "from jax._src import core"}, "cli.py:1 uses jax._src"),
    (private_jax, {"cli.py": "x = 'jax._src.core'"}, "cli.py:1 uses jax._src"),
    (probing, {"cli.py": "x = hasattr(1, 'a')"}, "cli.py:1 probes with hasattr"),
    (
        named_mesh_axes,
        {"lm/_decoder.py": "x = y['tensor']"},
        "lm/_decoder.py:1 names the mesh axis 'tensor'",
    ),
    (
        named_kinds,
        {"cli.py": "x = kind == 'tensor+sequence'"},
        "cli.py:1 names the kind of parallelism 'tensor+sequence'",
    ),
    (
        named_kinds,
        {"mesh/_spec.py": "x = kind in ('rows', 'data')"},
        "mesh/_spec.py:1 names the kind of parallelism 'data'",
    ),
    (
        undocumented,
        {"mesh/_spec.py": "def f() -> None: ..."},
        "mesh/_spec.py:1 f has no docstring",
    ),
    (
        undocumented,
        {"mesh/_spec.py": 'class f:\n    """A."""\n    def g(self) -> None: ...'},
        "mesh/_spec.py:3 f.g has no docstring",
    ),
    (
        undocumented,
        {
            "models/__init__.py": LAZY.format(home="._decoder", typed="._decoder"),
            "models/_decoder.py": "def g() -> None: ...",
        },
        "models/_decoder.py:1 g has no docstring",
    ),
    (
        lazy_mismatches,
        {"models/__init__.py": LAZY.format(home="._decoder:h", typed="._decoder")},
        "models/__init__.py:1 g is ._decoder:h lazily, ._decoder:g typed",
    ),
    (
        unannotated,
        {"cli.py": "class A:\n    def f(self, x, *y: int): ..."},
        "cli.py:2 f does not annotate x, its result",
    ),
    *[
        (unlisted_state, {"_errors.py": source}, f"_errors.py:{line} {message}")
        for source, line, message in (
            ("@functools.cache\ndef f(x: int) -> int: ...", 2, "f is a cache without bound"),
            ("@lru_cache(None)\ndef f(x: int) -> int: ...", 2, "f is a cache without bound"),
            ("def g() -> None:\n    f = cache(print)", 2, "g is a cache without bound"),
            (
                "@lru_cache(maxsize=4)\ndef f(x: int) -> int: ...",
                2,
                "f outlives its call and is not in KEPT",
            ),
            ("_made: dict[str, int] = {}", 1, "_made outlives its call and is not in KEPT"),
            (
                "X = {1: 2}\ndef f() -> None:\n    X[3] = 4",
                1,
                "X outlives its call and is not in KEPT",
            ),
            (
                "X = 0\ndef f() -> None:\n    global X",
                1,
                "X outlives its call and is not in KEPT",
            ),
        )
    ],
]


def fake_tree(root: Path, files: dict[str, str]) -> Tree:
    """A small tree that keeps every rule, with some files put in or replaced."""
    clean = {
        "__init__.py": '"""A package."""\nfrom .mesh import f\n__all__ = ["f"]',
        "_errors.py": LONG,
        "mesh/__init__.py": '"""A part."""\nfrom ._spec import f\n__all__ = ["f"]',
        "mesh/_spec.py": 'from .._errors import x\ndef f(a: int) -> None:\n    """Adds."""' + LONG,
        "models/__init__.py": '"""A part that may speak of data and tensor."""',
        "models/_decoder.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    from .. import cli\nfrom ..mesh import f" + LONG,
        "inspect/_hlo.py": "from ..mesh import f" + LONG,
        "cli.py": "from .verify import x\nfrom .models import y" + LONG,
        "verify/__init__.py": '"""A part."""',
    }
    for name, source in {**clean, **files}.items():
        path = root / "shardkit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    (root / "page.md").write_text(PAGE)
    return Tree(root, root / "page.md")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_package_keeps_the_rule(check):
    violations = check(HOUSE)
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_clean_tree_passes(check, tmp_path):
    assert check(fake_tree(tmp_path, {})) == []


@pytest.mark.parametrize(
    ("check", "files", "message"),
    VIOLATIONS,
    ids=[f"{check.__name__}-{i}" for i, (check, _, _) in enumerate(VIOLATIONS)],
)
def test_a_violation_is_caught(check, files, message, tmp_path):
    found = check(fake_tree(tmp_path, files))
    assert [row.removeprefix("shardkit/") for row in found] == [message]


def test_the_kinds_are_those_of_the_registry():
    assert {kind.name for kind in known_kinds()} == KINDS


def test_every_check_is_seen_to_catch_something():
    assert {check for check, _, _ in VIOLATIONS} == set(CHECKS)


def test_a_bound_that_changes_is_changed_in_the_table_and_a_row_goes_with_its_cache(tmp_path):
    tree = fake_tree(tmp_path, {"_errors.py": "@lru_cache(4)\ndef f(x: int) -> int: ..."})
    assert unlisted_state(tree, {"_errors.f": (4, "")}) == []
    (wrong,) = unlisted_state(tree, {"_errors.f": (8, "")})
    assert wrong == "shardkit/_errors.py:2 f keeps 4, and 8 in KEPT"
    (left,) = unlisted_state(tree, {"_errors.f": (4, ""), "_errors.g": (4, "")})
    assert left == "_errors.g is in KEPT and not in the package"


def import_in_a_process_without_backend(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code where starting a backend fails, because its platform does not exist."""
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


def public_modules() -> list[str]:
    modules = HOUSE.modules
    return [name for name, path in modules.items() if path.name != "__main__.py"]


def test_importing_every_module_starts_no_backend():
    code = "import " + ", ".join(public_modules())
    done = import_in_a_process_without_backend(code)
    assert done.returncode == 0, done.stderr


def test_a_module_that_starts_a_backend_would_be_seen():
    done = import_in_a_process_without_backend("import shardkit, jax.numpy as jnp; jnp.zeros(1)")
    assert done.returncode != 0
    assert "no_such_platform" in done.stderr
