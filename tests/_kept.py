"""What the package keeps from one call to the next: every cache and every mutable global."""

import ast
from collections.abc import Iterator

from ._architecture import Function, Tree

# {where: (bound, why that bound)}. `bound` is the number of entries; of what is no cache, why it
# does not grow. Caches of one instance (`functools.cached_property`) and `ContextVar`s, which a
# `with` block sets back, do not outlive their owners and are not listed.
KEPT: dict[str, tuple[int | str, str]] = {
    "_core.split_rng._generator": (64, "one for each set of draws; a step has one or two"),
    "nn._remat.policy": (64, "one for each name; `save:` takes any list of names"),
    "nn._remat.regathering": (64, "policies × sets of axes that are gathered"),
    "checkpoint._fingerprint._program": (8, "meshes in use; each holds compiled programs"),
    "data._shuffled_index.epoch_order": (2, "this epoch and the next; each up to 128 MiB"),
    "mesh._simulate._settled": ("one number", "devices of the process, settled once"),
    "parallel._kinds._weighed": (8, "sets of kinds: the shipped ones, and those of a `with` block"),
    "planner._stages.roles": (256, "schedules × stages of one search; a few KiB each"),
    "rules._path._pattern": (1024, "globs of some models; about 1 KiB each"),
    "parity._reference._jit_sgd_update": (8, "one for each verification under way"),
    "cli._verify.run": ("meshes of the command, and one device", "gone when the command ends"),
    "step._batch_variants.KEPT": (8, "forms of a batch that a step keeps: lengths in buckets"),
}

_MUTABLE = {"dict", "list", "set", "defaultdict", "OrderedDict", "Counter", "deque", "bytearray"}
_MUTABLE |= {"WeakKeyDictionary", "WeakValueDictionary", "WeakSet", "count"}
_CHANGES = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem"}
_CHANGES |= {"clear", "remove", "discard", "appendleft"}


def unlisted_state(tree: Tree, listed: dict[str, tuple[int | str, str]] = KEPT) -> list[str]:
    """Caches and mutable globals that the table does not know, or knows with another bound."""
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
    """Functions that keep results: name, line, and bound, None where there is none."""
    outer = {node.func for node in ast.walk(parsed) if isinstance(node, ast.Call)}
    for owner, node in _owned(parsed):
        if isinstance(node, Function):
            takes = ast.unparse(node.args)
            for one in node.decorator_list:
                if (bound := _bound(one)) != "no cache" and (takes or bound is not None):
                    yield node.name, node.lineno, bound
        elif isinstance(node, ast.Call) and node not in outer:  # not the first call of f(4)(g)
            if (bound := _bound(node.func)) != "no cache":
                yield owner, node.lineno, bound


def _bound(cache: ast.expr) -> int | str | None:
    """Bound of `lru_cache(maxsize=...)`, None for none, "no cache" of anything else."""
    call = cache.func if isinstance(cache, ast.Call) else cache
    name = ast.unparse(call).rpartition(".")[2]
    if name == "cache":
        return None
    if name != "lru_cache":
        return "no cache"
    given = [*cache.args, *[k.value for k in cache.keywords]] if isinstance(cache, ast.Call) else []
    if not given:
        return 128
    return given[0].value if isinstance(given[0], ast.Constant) else ast.unparse(given[0])


def _owned(parsed: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Every node, with the name of the function that it is in; decorators are not in theirs."""

    def visit(node: ast.AST, owner: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(node, Function) and child in node.decorator_list:
                continue
            yield owner, child
            yield from visit(child, child.name if isinstance(child, Function) else owner)

    return visit(parsed, "")


def _globals(parsed: ast.Module) -> Iterator[tuple[str, int, int | str]]:
    """Names of a module that a function of it changes or that begin empty, to be filled.

    `KEPT = 8` is how a module says what each of its objects keeps at most.
    """
    changed = set(_changed(parsed))
    for node in parsed.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and value is not None:
                if target.id == "KEPT" and isinstance(getattr(value, "value", None), int):
                    yield target.id, node.lineno, value.value
                elif target.id in changed or _begins_empty(value):
                    yield target.id, node.lineno, "mutable"


def _begins_empty(value: ast.expr) -> bool:
    if isinstance(value, ast.Dict | ast.List):
        return not (value.keys if isinstance(value, ast.Dict) else value.elts)
    if isinstance(value, ast.Call):
        function = value.func.value if isinstance(value.func, ast.Subscript) else value.func
        return ast.unparse(function).rpartition(".")[2] in _MUTABLE and not value.args
    return False


def _changed(parsed: ast.Module) -> Iterator[str]:
    """Names that a function declares global or changes in place, where it has no such local."""
    for function in (node for node in ast.walk(parsed) if isinstance(node, Function)):
        local = {
            node.id
            for node in ast.walk(function)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        } | {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                yield from node.names
            held = None
            if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
                held = node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                held = node.func.value if node.func.attr in _CHANGES else None
            if isinstance(held, ast.Name) and held.id not in local:
                yield held.id
