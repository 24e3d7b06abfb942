"""The rules of the house as functions of a source tree, so that a fake tree can violate them."""

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

MESH_AXES = frozenset({"data", "fsdp", "tensor", "context", "pipe", "expert"})
KINDS = frozenset({"data", "fsdp", "zero", "tensor", "context", "pipeline", "expert"})
"""Names of the kinds of parallelism; `test_architecture` compares them with the registry."""
SAME_WORD = {
    # The input data: a package, a section of configs and records, a cause of lost time, an item of
    # a checkpoint.
    "data": {"shardkit", "config", "run", "checkpoint", "lm"},
}
FILE_LINES, FUNCTION_LINES, COLUMNS, IMPORTS = 400, 60, 100, 10
SMALL_FILE_LINES, POSITIONAL = 30, 5
POSITIONAL_ONLY = {
    # Functions that do not take these operands by keyword.
    "jax.lax.ragged_all_to_all": "a primitive of six operands, whose order JAX fixes",
}

# A side room imports floors 0 and 1, and is imported by those above 1.
_SIDE, _ROOF = 1.5, 100.0

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Tree:
    """A package on disk, and the page with the table of its floors."""

    root: Path
    page: Path
    package: str = "shardkit"

    @functools.cached_property
    def modules(self) -> dict[str, Path]:
        """`{"shardkit.mesh._spec": path}`; a package stands for its `__init__.py`."""
        modules = {}
        for path in sorted((self.root / self.package).rglob("*.py")):
            parts = path.relative_to(self.root).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return modules

    @functools.cached_property
    def parsed(self) -> dict[str, ast.Module]:
        return {name: ast.parse(path.read_text()) for name, path in self.modules.items()}

    @functools.cached_property
    def imports(self) -> dict[str, dict[str, int]]:
        """`{module: {module of the package that it imports: line}}`."""
        return {name: dict(self._find_imports(name)) for name in self.modules}

    def _find_imports(self, name: str) -> Iterator[tuple[str, int]]:
        skipped = {id(inner) for inner in _type_checking(self.parsed[name])}
        for node in ast.walk(self.parsed[name]):
            if id(node) in skipped:
                continue
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield from self._in_package(alias.name, node.lineno)
            if isinstance(node, ast.ImportFrom):
                base = self._resolve_base(name, node)
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    yield from self._in_package(
                        inner if inner in self.modules else base, node.lineno
                    )

    def _resolve_base(self, name: str, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        is_package = self.modules[name].name == "__init__.py"
        parts = name.split(".")
        base = parts[: len(parts) - node.level + is_package]
        return ".".join([*base, *([node.module] if node.module else [])])

    def _in_package(self, name: str, line: int) -> Iterator[tuple[str, int]]:
        if name in self.modules:
            yield name, line

    @functools.cached_property
    def floors(self) -> dict[str, float]:
        """`{"mesh": 1.0, "report": 1.5, "cli": 100.0}` from the page's table."""
        named = {"side": _SIDE, "roof": _ROOF}
        floors = {}
        for line in self.page.read_text().splitlines():
            if match := re.match(r"\|\s*(\d+|side|roof)\s*\|([^|]*)\|", line):
                for part in re.findall(r"`(\w+)/?`", match[2]):
                    floors[part] = named.get(match[1]) or float(match[1])
        return floors

    def part(self, module: str) -> str:
        """The name of a module in the table: `mesh` for `shardkit.mesh._spec`."""
        return module.removeprefix(f"{self.package}.").split(".")[0]

    def where(self, module: str, line: int) -> str:
        return f"{self.modules[module].relative_to(self.root)}:{line}"


def floor_violations(tree: Tree) -> list[str]:
    """Imports that do not go down, and packages that are not in the table."""
    unknown = sorted({tree.part(m) for m in tree.modules} - set(tree.floors) - {tree.package})
    rows = [f"{part} is not in the table of {tree.page.name}" for part in unknown]
    for module, imported in tree.imports.items():
        own = tree.part(module)
        if own not in tree.floors:
            continue  # the package's own `__init__`, or reported above
        for other, line in imported.items():
            part = tree.part(other)
            if part == own or part not in tree.floors:
                if other == tree.package:
                    rows.append(f"{tree.where(module, line)} imports {tree.package} itself")
                continue
            down = tree.floors[part] < tree.floors[own] or tree.floors[own] == _ROOF
            if not down:
                rows.append(f"{tree.where(module, line)} imports {other}, which is not below it")
    return rows


def cycles(tree: Tree) -> list[str]:
    """Cycles of imports."""
    rows, done = [], set[str]()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            rows.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for other in tree.imports[module]:
                visit(other, (*path, module))
            done.add(module)

    for module in tree.modules:
        visit(module, ())
    return rows


def import_counts(tree: Tree) -> list[str]:
    """Modules that import too many others, not counting `_core`; an `__init__` can import all."""
    shared = f"{tree.package}._core"
    return [
        f"{tree.where(module, 1)} imports {len(others)} modules of the package, not {IMPORTS}"
        for module, imported in tree.imports.items()
        if (others := {m for m in imported if m != module and not m.startswith(shared)})
        and len(others) > IMPORTS
        and tree.modules[module].name != "__init__.py"
    ]


def size_violations(tree: Tree) -> list[str]:
    """Files, functions and lines that are too long; functions without their docstring."""
    rows = []
    for module, path in tree.modules.items():
        lines = path.read_text().splitlines()
        if len(lines) > FILE_LINES:
            rows.append(f"{tree.where(module, 1)} has {len(lines)} lines, not {FILE_LINES}")
        for number, line in enumerate(lines, 1):
            if len(line) > COLUMNS:
                rows.append(f"{tree.where(module, number)} has {len(line)} columns, not {COLUMNS}")
        for node in _functions(tree.parsed[module]):
            if (size := _code_lines(node)) > FUNCTION_LINES:
                rows.append(
                    f"{tree.where(module, node.lineno)} {node.name} has {size} lines, "
                    f"not {FUNCTION_LINES}"
                )
    return rows


def small_files(tree: Tree) -> list[str]:
    """Files too small to be a module; an `__init__` or `__main__` is an entrance and can be."""
    return [
        f"{tree.where(module, 1)} has {lines} lines, fewer than {SMALL_FILE_LINES}"
        for module, path in tree.modules.items()
        if path.stem not in ("__init__", "__main__")
        and (lines := len(path.read_text().splitlines())) < SMALL_FILE_LINES
    ]


def same_names(tree: Tree) -> list[str]:
    """Module-level classes that share a name: neither a reader nor an import tells them apart."""
    places: dict[str, list[str]] = {}
    for module, parsed in tree.parsed.items():
        for node in parsed.body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(tree.where(module, node.lineno))
    return [
        f"{' and '.join(where)} define a class {name} each"
        for name, where in sorted(places.items())
        if len(where) > 1
    ]


def positional_calls(tree: Tree) -> list[str]:
    """Calls with so many positional arguments that two can be swapped without being noticed."""
    rows = []
    for module, parsed in tree.parsed.items():
        for node in ast.walk(parsed):
            if not isinstance(node, ast.Call):
                continue
            number = sum(not isinstance(argument, ast.Starred) for argument in node.args)
            function = ast.unparse(node.func)
            if number > POSITIONAL and function not in POSITIONAL_ONLY:
                where = tree.where(module, node.lineno)
                rows.append(f"{where} calls {function} with {number} positional arguments")
    return rows


def hidden_modules(tree: Tree) -> list[str]:
    """Modules that a public function or class of their package hides.

    `import shardkit.plan` would give a module, and `shardkit.plan` a function.
    """
    rows = []
    for module, parsed in tree.parsed.items():
        if tree.modules[module].name != "__init__.py":
            continue
        homes = _lazy_homes(parsed)
        exported = {name for name in _exported(parsed) if homes.get(name, name) is not None}
        imported = [node for node in parsed.body if isinstance(node, ast.ImportFrom)]
        submodules = {
            alias.name
            for node in imported
            if tree._resolve_base(module, node) == module
            for alias in node.names
        }
        rows += [
            f"{tree.where(module, 1)} hides its module {name} behind a name"
            for name in sorted(exported - submodules)
            if f"{module}.{name}" in tree.modules
        ]
    return rows


def private_jax(tree: Tree) -> list[str]:
    """Uses of JAX's private modules, in code or text."""
    return _matching_lines(tree, re.compile(r"jax\._src"), "uses jax._src")


def probing(tree: Tree) -> list[str]:
    """Calls of `hasattr`: the type of an object is known, not probed."""
    return [
        f"{tree.where(module, node.lineno)} probes with hasattr"
        for module, parsed in tree.parsed.items()
        for node in ast.walk(parsed)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "hasattr"
    ]


def named_mesh_axes(tree: Tree, part: str = "lm") -> list[str]:
    """Strings in the reference model that name a mesh axis."""
    return [
        f"{tree.where(module, node.lineno)} names the mesh axis {node.value!r}"
        for module, parsed in tree.parsed.items()
        if tree.part(module) == part and not module.endswith("._train")  # has a section "data"
        for node in ast.walk(parsed)
        if isinstance(node, ast.Constant) and node.value in MESH_AXES
    ]


def named_kinds(tree: Tree, home: str = "parallel") -> list[str]:
    """Strings outside `parallel/` that name a kind of parallelism, with or without a variant.

    Modules ask the registered kinds instead: a name omits the next kind.
    """
    return [
        f"{tree.where(module, node.lineno)} names the kind of parallelism {node.value!r}"
        for module, parsed in tree.parsed.items()
        for node in ast.walk(parsed)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if (name := node.value.partition("+")[0]) in KINDS
        and tree.part(module) not in {home, *SAME_WORD.get(name, ())}
    ]


def undocumented(tree: Tree) -> list[str]:
    """Public functions, classes and their public methods without a docstring.

    Public is what an `__init__.py` exports: in `__all__`, or imported `as` itself. It is defined in
    private modules, which ruff's rules for docstrings skip.
    """
    rows = []
    for module, parsed in tree.parsed.items():
        if tree.modules[module].name != "__init__.py":
            continue
        if not ast.get_docstring(parsed):
            rows.append(f"{tree.where(module, 1)} has no docstring")
        for name in _exported(parsed):
            for home, node in _definitions(tree, module, name):
                rows += [
                    f"{tree.where(home, inner.lineno)} {label} has no docstring"
                    for label, inner in _documented_nodes(node)
                    if not ast.get_docstring(inner)
                ]
    return sorted(set(rows))


def unannotated(tree: Tree) -> list[str]:
    """Functions with a parameter or a result without annotation."""
    rows = []
    for module, parsed in tree.parsed.items():
        for node in _functions(parsed):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [star for star in (node.args.vararg, node.args.kwarg) if star]
            bare = [a.arg for a in arguments if not a.annotation and a.arg not in ("self", "cls")]
            if not node.returns:
                bare.append("its result")
            if bare:
                where = tree.where(module, node.lineno)
                rows.append(f"{where} {node.name} does not annotate {', '.join(bare)}")
    return rows


def lazy_mismatches(tree: Tree) -> list[str]:
    """Names of a lazy `__init__` whose type-checking import differs from the one at run time."""
    rows = []
    for module, parsed in tree.parsed.items():
        homes = _lazy_homes(parsed)
        typed = {
            alias.asname or alias.name: f"{'.' * node.level}{node.module or ''}:{alias.name}"
            for node in _typed_imports(parsed)
            for alias in node.names
        }
        lazy = {
            name: f".:{name}" if home is None else home if ":" in home else f"{home}:{name}"
            for name, home in homes.items()
        }
        rows += [
            f"{tree.where(module, 1)} {name} is {lazy.get(name)} lazily, {typed.get(name)} typed"
            for name in (sorted(typed.keys() | lazy.keys()) if homes else ())
            if typed.get(name) != lazy.get(name)
        ]
    return rows


def _type_checking(parsed: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(parsed):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.body:
                yield from ast.walk(statement)


def _functions(parsed: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(parsed) if isinstance(node, Function))


def _code_lines(node: Function) -> int:
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    is_doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return lines - ((first.end_lineno or 0) - first.lineno + 1 if is_doc else 0)


def _matching_lines(tree: Tree, pattern: re.Pattern[str], what: str) -> list[str]:
    return [
        f"{tree.where(module, number)} {what}"
        for module, path in tree.modules.items()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]


def _lazy_homes(parsed: ast.Module) -> dict[str, str | None]:
    """The table of a package that imports its names lazily: `{name: module, or None}`."""
    for node in ast.walk(parsed):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy_names":
            homes = ast.literal_eval(node.args[1])
            return {name: home for names, home in homes.items() for name in names.split()}
    return {}


def _typed_imports(parsed: ast.Module) -> list[ast.ImportFrom]:
    return [node for node in _type_checking(parsed) if isinstance(node, ast.ImportFrom)]


def _exported(parsed: ast.Module) -> list[str]:
    for node in parsed.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    imported = [
        alias for node in parsed.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    return [*_lazy_homes(parsed), *(one.name for one in imported if one.name == one.asname)]


def _definitions(tree: Tree, module: str, name: str) -> Iterator[tuple[str, ast.AST]]:
    """Follows re-exports to the definition of a function or class: `(module, node)`."""
    parsed = tree.parsed[module]
    for node in (*parsed.body, *(_typed_imports(parsed) if _lazy_homes(parsed) else ())):
        if isinstance(node, Function | ast.ClassDef) and node.name == name:
            yield module, node
        if isinstance(node, ast.ImportFrom):
            base = tree._resolve_base(module, node)
            for alias in node.names:
                if (alias.asname or alias.name) == name and base in tree.modules:
                    if f"{base}.{alias.name}" not in tree.modules:
                        yield from _definitions(tree, base, alias.name)


def _documented_nodes(node: ast.AST) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    assert isinstance(node, Function | ast.ClassDef)
    yield node.name, node
    if isinstance(node, ast.ClassDef):
        for inner in node.body:
            if isinstance(inner, Function) and not inner.name.startswith("_"):
                yield f"{node.name}.{inner.name}", inner
