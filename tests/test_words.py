"""One name per thing: names that were replaced are gone, and every name that is written exists."""

import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# {old, as a regex: new}. Words that are common English count only as a member of `sk`.
RETIRED = {
    r"\bDeclaration\b": "StepSpec",
    r"\bPerShards?\b": "ShardMapLoss",
    r"\bCertificate\b": "ParityReport",
    r"\bWatchers?\b": "Callback",
    r"\bDamageError\b": "CheckpointCorruptedError",
    r"\bshard_sum\b": "nn.psum",
    r"\bshard_max\b": "nn.pmax",
    r"\bshard_start\b": "nn.shard_offset",
    r"\bsk\.weight\b": "sk.nn.use_param",
    r"\bsk\.staged\b": "sk.nn.layer_stack",
    r"\bsk\.chain\b|\bchain\((?:AxisRules|PathRules)": "first_match",
    r"\bsk\.explain\b": "sk.explain_rules",
    r"\bsk\.released\b|`released`": "state.halted",
    r"\bsk\.Named\b|\bNamed\(": "WithAxes",
    r"\bsk\.Compression\b|`Compression`": "GradientCompression",
    r"\bsk\.Keep\b|`Keep`|\bKeep\(": "RetentionPolicy",
    r"\bsk\.Peers\b|`Peers`|\bPeers\(": "ProcessGroup",
    r"\bsk\.Space\b|`Space`|\bSpace\(": "SearchSpace",
    r"\bsk\.(?:attention|constrain|experts|remat|route)\b": "sk.nn.…",
    r"\bstep\.put\(": "step.shard_batch(",
    r"\bstep\.rows\b": "step.local_rows",
    r"\bcheck_room\b": "check_memory",
    r"\bkeep_every\b|\bkeep_best\b": "keep_period, best_to_keep",
    r"reduce=\"(?:once|each)\"": 'reduce="end" or "every"',
    r"\bPrecision\((?:params|compute|reduce)=": "Precision(param_dtype=, compute_dtype=, …)",
    r"\bmade[- _]up\b": "random",
    r"\bparity certificate|\bcertificates?\b": "parity report",
    r"\bcarriers?\b": "override",
}
# Names of modules and functions that these tests invent.
INVENTED = {"tests/test_architecture.py", "tests/test_words.py"}


FOLDERS = ("shardkit", "tests", "benchmarks", "configs", "docs", "README.md", "pyproject.toml")


def read_pages(*folders: str) -> dict[str, str]:
    """`{path: text}` of the code and prose; CHANGELOG.md, which tells of old names, is left out."""
    paths = [
        path
        for folder in folders or FOLDERS
        for path in ([ROOT / folder] if (ROOT / folder).is_file() else (ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".md", ".toml") and "results" not in path.parts
    ]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(paths)}


def find_retired(pages: dict[str, str]) -> dict[tuple[str, str], str]:
    """`{(path, old word): message}`, with the first line that holds the word."""
    rows = {}
    for path, text in pages.items():
        for number, line in enumerate(text.splitlines(), 1):
            for pattern, new in RETIRED.items():
                for match in re.finditer(pattern, line):
                    message = f"{path}:{number} says {match[0]}: write {new}"
                    rows.setdefault((path, match[0]), message)
    return rows


def find_unknown(pages: dict[str, str]) -> dict[tuple[str, str], str]:
    """The same for names such as `sk.nn.remat` or `shardkit.step._spec` that do not exist."""
    rows = {}
    for path, text in pages.items():
        public = {
            f"shardkit{name}" for name in re.findall(r"(?<![\w.])sk((?:\.[A-Za-z_]\w*)+)", text)
        }
        # `sk.nn.remat` in full; of `sk.MeshSpec.build` and such only the public name.
        names = {".".join(name.split(".")[: 3 if ".nn." in name else 2]) for name in public}
        names |= set(re.findall(r"(?<![\w./-])shardkit(?:\.[A-Za-z_]\w*)+", text))
        for name in names:
            if path not in INVENTED and not _exists(name):
                rows[path, name] = f"{path} names {name}, which does not exist"
    return rows


def _exists(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_retired_names_are_gone_and_names_that_are_written_exist():
    found = find_retired(read_pages("shardkit", "docs", "README.md", "configs", "benchmarks"))
    found |= find_unknown(read_pages())
    assert not found, "\n".join(found.values())


OLD = [
    ("a Declaration is", "Declaration"),
    ("x = sk.weight(w, axes)", "sk.weight"),
    ("chain(PathRules({}))", "chain(PathRules"),
    ("@sk.remat", "sk.remat"),
    ('sk.Accumulate(4, reduce="once")', 'reduce="once"'),
    ("Precision(params=jnp.bfloat16)", "Precision(params="),
    ("`Keep` and `Space`", "`Keep`"),
    ("made-up batches", "made-up"),
]


@pytest.mark.parametrize(("line", "word"), OLD, ids=[word for _, word in OLD])
def test_a_retired_name_is_seen(line, word):
    found = find_retired({"a.py": f"\n{line}"})
    assert found["a.py", word].startswith(f"a.py:2 says {word}: write ")


def test_what_only_looks_like_a_retired_name_passes():
    clean = "NamedSharding keepdims chain(optax.adam) sk.nn.remat DRAWS Keep the key. Space is"
    assert find_retired({"a.py": clean}) == {}


@pytest.mark.parametrize("name", ["shardkit.step._gone", "sk.nn.weight", "sk.Watch.on_step"])
def test_a_name_that_does_not_exist_is_seen(name):
    text = "sk.nn.remat sk.MeshSpec.build shardkit.step._spec.StepSpec shardkit.errors"
    assert find_unknown({"a.py": text}) == {}
    (found,) = find_unknown({"a.py": f"{text} {name}"}).values()
    assert found.startswith("a.py names shardkit.")
