"""State that outlives a call: every cache and every mutable global of the package."""

import ast
from collections.abc import Iterator

from ._architecture import Function, Tree

# {where: (bound, what is kept)}. `bound` is the number of entries of a cache; of other state, the
# reason why it does not grow. Caches of an instance (`functools.cached_property`) and `ContextVar`s
# that a `with` block resets do not outlive their owners and are not listed.
KEPT: dict[str, tuple[int | str, str]] = {
    "_core.source._rank_file": (4096, "paths of the files that made operations"),
    "_core.source._bytecode_of": (256, "paths of the files whose lines are shown"),
    "_core.split_rng._generator": (64, "sets of draws; a step has one or two"),
    "nn._remat.parse_policy": (64, "names of policies; `save:` takes any list of names"),
    "nn._remat.regathering_policy": (64, "policies × sets of axes that are gathered"),
    "checkpoint._fingerprint._compile_fingerprints": (
        8,
        "meshes in use; each holds compiled programs",
    ),
    "checkpoint._advice.matches_none": (1024, "globs of one error, until it is raised"),
    "checkpoint._rename._compile_captures": (1024, "globs of `rename=`; about 1 KiB each"),
    "hf._pattern.parse": (256, "patterns of the tables of some models; below 1 KiB each"),
    "data._shuffled_index.epoch_order": (2, "this epoch and the next; each up to 128 MiB"),
    "mesh._simulate._settled": ("one number", "devices of the process, set once"),
    "parallel._kinds._planned": (8, "sets of kinds: the shipped ones, and those of a `with` block"),
    "planner._stages.read_tick_roles": (256, "schedules × stages of one search; a few KiB each"),
    "rules._path._compile_glob": (1024, "globs of some models; about 1 KiB each"),
    "parity._reference._jit_sgd_update": (8, "verifications in progress"),
    "parity._verify.verify": (4, "steps on default meshes and one device, until it returns"),
    "cli._verify.run": (
        "meshes of the command, and one device",
        "steps, until the command ends",
    ),
    "step.rows._rules.RULES": ("one rule a primitive", "filled while the package loads"),
    "step._batch_variants.KEPT": (8, "variants of a batch, such as lengths in buckets"),
}

_MUTABLE = {"dict", "list", "set", "defaultdict", "OrderedDict", "Counter", "deque", "bytearray"}
_MUTABLE |= {"WeakKeyDictionary", "WeakValueDictionary", "WeakSet", "count"}
_CHANGES = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem"}
_CHANGES |= {"clear", "remove", "discard", "appendleft"}


def unlisted_state(tree: Tree, listed: dict[str, tuple[int | str, str]] = KEPT) -> list[str]:
    """Caches and mutable globals that the table omits, or lists with another bound."""
    rows, seen = [], set[str]()
    for module, parsed in tree.parsed.items():
        short = module.removeprefix(f"{tree.package}.")
        for name, line, bound in [*_caches(parsed), *_globals(parsed)]:
            key = f"{short}.{name}"
            seen.add(key)
            where, row = tree.where(module, line), listed.get(key)
            if bound is None:
                rows.append(f"{where} {name} is a cache without bound")
            elif row is None:
                rows.append(f"{where} {name} outlives its call and is not in KEPT")
            elif isinstance(bound, int) and row[0] != bound:
                rows.append(f"{where} {name} keeps {bound}, and {row[0]!r} in KEPT")
    if tree.modules.keys() >= {f"{tree.package}.{key.rpartition('.')[0]}" for key in listed}:
        rows += [f"{key} is in KEPT and not in the package" for key in listed if key not in seen]
    return rows


def _caches(parsed: ast.Module) -> Iterator[tuple[str, int, int | str | None]]:
    """Functions with a cache: name, line, and bound; None for no bound."""
    outer = {node.func for node in ast.walk(parsed) if isinstance(node, ast.Call)}
    for owner, node in _nodes_by_function(parsed):
        if isinstance(node, Function):
            arguments = ast.unparse(node.args)
            for decorator in node.decorator_list:
                # A function without arguments has one result.
                if (bound := _bound(decorator)) != "no cache" and (arguments or bound is not None):
                    yield node.name, node.lineno, bound
        elif isinstance(node, ast.Call) and node not in outer:  # not the first call of f(4)(g)
            if (bound := _bound(node.func)) != "no cache":
                yield owner, node.lineno, bound


def _bound(cache: ast.expr) -> int | str | None:
    """Bound of `lru_cache(maxsize=...)`; None for no bound; "no cache" for other decorators."""
    call = cache.func if isinstance(cache, ast.Call) else cache
    name = ast.unparse(call).rpartition(".")[2]
    if name == "cache":
        return None
    if name != "lru_cache":
        return "no cache"
    is_call = isinstance(cache, ast.Call)
    sizes = [*cache.args, *[k.value for k in cache.keywords]] if is_call else []
    if not sizes:
        return 128
    return sizes[0].value if isinstance(sizes[0], ast.Constant) else ast.unparse(sizes[0])


def _nodes_by_function(parsed: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """`(function that contains the node, node)`; a decorator is outside its function."""

    def visit(node: ast.AST, owner: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(node, Function) and child in node.decorator_list:
                continue
            yield owner, child
            yield from visit(child, child.name if isinstance(child, Function) else owner)

    return visit(parsed, "")


def _globals(parsed: ast.Module) -> Iterator[tuple[str, int, int | str]]:
    """Names of a module that one of its functions changes, or that are empty at first.

    A module whose objects have a cache of their own states its bound as `KEPT = 8`.
    """
    changed = set(_changed(parsed))
    for node in parsed.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and value is not None:
                if target.id == "KEPT" and isinstance(getattr(value, "value", None), int):
                    yield target.id, node.lineno, value.value
                elif target.id in changed or _is_empty(value):
                    yield target.id, node.lineno, "mutable"


def _is_empty(value: ast.expr) -> bool:
    if isinstance(value, ast.Dict | ast.List):
        return not (value.keys if isinstance(value, ast.Dict) else value.elts)
    if isinstance(value, ast.Call):
        function = value.func.value if isinstance(value.func, ast.Subscript) else value.func
        return ast.unparse(function).rpartition(".")[2] in _MUTABLE and not value.args
    return False


def _changed(parsed: ast.Module) -> Iterator[str]:
    """Names that a function declares global, or changes in place without a local of that name."""
    for function in (node for node in ast.walk(parsed) if isinstance(node, Function)):
        local = {
            node.id
            for node in ast.walk(function)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        } | {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                yield from node.names
            target = None
            if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
                target = node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                target = node.func.value if node.func.attr in _CHANGES else None
            if isinstance(target, ast.Name) and target.id not in local:
                yield target.id
