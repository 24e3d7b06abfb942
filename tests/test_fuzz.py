"""Texts that a user or a file can hold: every one is read, or refused with an error of shardkit.

Each grammar is fuzzed with its own words, cut and joined at random, and with any characters.
"""

import contextlib
import json

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shardkit as sk
from shardkit._core.io import Table, make_console, print_table
from shardkit.checkpoint._manifest import _crc, _render
from shardkit.cli import main
from shardkit.config import Config
from shardkit.config._override import _fields, apply_overrides
from shardkit.mesh import Target
from shardkit.report import Report
from shardkit.report.hlo._hlo import parse
from shardkit.sweeps import Sweep, SweepCase, SweepRow
from shardkit.sweeps._journal import Journal
from shardkit.sweeps._row import compiled_figures

HARD = [
    *["", "²", "٣", "inf", "nan", "-inf", "1e999", "10**23", "9" * 5000, "-1", "0", "1", "1.5"],
    *["none", "true", "\0", "\x1b[31m", "\ud800", "(" * 300, "[]", "{}", "lambda: 1", "x.y", "1+1"],
    *["|", "=", ",", ":", "(", ")", "x", ".", "\n", " ", "'", '"', "\\", "#", "**", "s3://x/y"],
]
MESH = ["data=2", "tensor=-1", "dcn.data=2", "dcn.", "data", "fsdp=4", "pipe=2"]
STRATEGY = [
    *["data", "fsdp", "zero(stage=1)", "tensor(sequence=True)", "context(method='ring')", "expert"],
    *["pipeline", "pipeline(micro_batches=4)", "schedule='1f1b'", "**{}", "axis=None", "stage=7"],
]
TARGET = ["local", "cpu", "8", "tpu", "v5p", "v5e", "4x4x4", "16x16", "gpu", "h100", "1x8", "2x "]
HLO = ["f32[8,4]{1,0}", "replica_groups={{0,1}}", "<=[2]", "%x", "ENTRY", "all-reduce("]
JSON = ["{", "}", "[", "]", '"', ",", "null", "true", '"mesh"', "[" * 100_000, "1e300"]


def texts(words):
    pieces = st.one_of(st.sampled_from(words), st.sampled_from(HARD), st.text(max_size=4))
    return st.lists(pieces, max_size=7).map("".join)


def all_paths(node, before=""):
    for name, (_, value) in _fields(node)[0].items():
        yield f"{before}{name}"
        yield from all_paths(value, f"{before}{name}.")


PATHS = list(all_paths(Config()))
VALUES = [*MESH, *STRATEGY, *TARGET, "every 0", "10:15", "save:a,b", "nano", "sgd", "0.9,0.95"]


@st.composite
def edited(draw, text):
    """A text with a few pieces cut out, doubled, or replaced by other pieces."""
    for _ in range(draw(st.integers(1, 4))):
        at, n = draw(st.integers(0, len(text))), draw(st.sampled_from([0, 1, 3, 40]))
        piece = draw(st.one_of(texts(HLO + JSON[:-2]), st.just(text[at : at + 60])))
        text = text[:at] + piece + text[at + n :]
    return text


WRONG = [
    *[None, -1, 0, "x", "", [], {}, 1e300, True, [1], {"a": 1}, "9" * 50, 10**30, "\x1b[2J"],
    *[float("nan"), "object", "key<fry>", "../x", [-1, 2]],
]


@st.composite
def changed(draw, document):
    """A JSON document with one value somewhere removed or of another type."""
    root = node = json.loads(document)
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw(st.sampled_from(keys))
        below = node[key]
        if not isinstance(below, dict | list) or not below or draw(st.booleans()):
            break
        node = below
    if draw(st.booleans()):
        node[key] = draw(st.sampled_from(WRONG))
    else:
        del node[key]
    return json.dumps(root)


def set_field(text):
    apply_overrides(Config(), [text])


def read_report(text):
    str(Report.from_json(text))


@pytest.fixture(scope="module")
def step():
    return sk.compile_step(
        lambda params, batch, key: jnp.mean((batch @ params) ** 2),
        optax.sgd(0.1),
        init=lambda key: jnp.ones((4, 2)),
        batch=jnp.ones((8, 4)),
        mesh=sk.MeshSpec(data=2).build(devices=jax.devices()[:2]),
        strategy=sk.strategies.data(),
    )


@pytest.fixture(scope="module")
def read_journal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")

    def read(text):
        (folder / "rows.jsonl").write_text(text, "utf-8", "replace")
        with Journal(folder, {"x": 1}) as journal:
            swept = Sweep(tuple(journal.rows.values()), folder, "fuzzed")
        str(swept)
        swept.to_csv()

    return read


@pytest.fixture(scope="module")
def read_manifest(step, tmp_path_factory):
    """Reads, restores and shows a checkpoint whose manifest is a text with a valid checksum."""
    folder = tmp_path_factory.mktemp("saved")
    state = {"state": step.init(jax.random.key(0)), "drawn": jnp.ones((2, 3), jnp.bfloat16)}
    sk.Checkpointer(folder).save(3, state, data={"batch": 3}, metrics={"loss": 1.0})
    path = folder / "step-00000003" / "manifest.json"

    def read(text):
        fields = json.loads(text)
        fields.pop("crc32", None)
        try:
            path.write_text(_render({**fields, "crc32": _crc(_render(fields))}))
        except ValueError:  # NaN, which is no JSON
            path.write_text(text)
        with contextlib.suppress(sk.ShardkitError):
            sk.Checkpointer(folder).restore(state)
        assert main(["checkpoint", "inspect", str(folder)]) in (0, 2)
        assert main(["checkpoint", "verify", str(folder), "--values"]) in (0, 1)

    return read, path.read_text()


HEADER = '{"identity": {"x": 1}, "shardkit_sweep": 2}\n'


def journal_row(step):
    """A line of a sweep with every kind of figure."""
    times = {"median": 0.1, "low": 0.09, "high": 0.2, "samples": 5}
    return SweepRow(
        SweepCase((("data", 2),), 2, "full"),
        "ok",
        {"target": "cpu:2", "device_kind": "cpu"},
        compiled=compiled_figures(step.report()),
        measured={"compile_seconds": {"whole": 1.0}, "step_seconds": times, "where": "here"},
        modelled={"step_seconds": 0.1, "memory": 10, "wire": 11, "not_modelled": "x"},
        verified={"ok": True},
        provenance={"commit": None, "date": "now", "versions": {"jax": "1"}},
    ).to_line()


FIELDS = st.builds("{}={}".format, st.one_of(st.sampled_from(PATHS), texts(PATHS)), texts(VALUES))
GRAMMARS = {
    "fields": lambda step, *_: (set_field, FIELDS),
    "meshes": lambda step, *_: (set_field, texts(MESH).map("mesh={}".format)),
    "strategies": lambda step, *_: (set_field, texts(STRATEGY).map("strategy={}".format)),
    "targets": lambda step, *_: (Target.parse, texts(TARGET)),
    "HLO": lambda step, *_: (parse, st.one_of(edited(step.hlo()), texts(HLO))),
    "manifests": lambda step, journal, manifest: (manifest[0], changed(manifest[1])),
    "reports": lambda step, *_: (
        read_report,
        st.one_of(changed(step.report().to_json()), edited(step.report().to_json()), texts(JSON)),
    ),
    "journals": lambda step, journal, manifest: (
        journal,
        st.one_of(
            edited(HEADER),
            texts(JSON).map(lambda line: f"{HEADER}{line}\n"),
            changed(journal_row(step)).map(lambda line: f"{HEADER}{line}\n"),
        ),
    ),
}


_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


def fuzz(grammar, read_from, examples):
    read, strategy = GRAMMARS[grammar](*read_from)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=_SLOW,
    )
    @given(strategy)
    def check(text):
        said = ""
        try:
            read(text)
        except sk.ShardkitError as error:
            said = str(error)
        assert not set(said) & set("\x1b\r\0")

    check()


@pytest.fixture(scope="module")
def read_from(step, read_journal, read_manifest):
    return step, read_journal, read_manifest


@pytest.mark.parametrize("grammar", GRAMMARS)
def test_every_text_is_read_or_refused(grammar, read_from):
    fuzz(grammar, read_from, 60)


@pytest.mark.slow
@pytest.mark.parametrize(
    "examples", [2_000, pytest.param(20_000, marks=pytest.mark.exhaustive)], ids="{:,}".format
)
@pytest.mark.parametrize("grammar", GRAMMARS)
def test_thousands_of_texts_are_read_or_refused(grammar, examples, read_from):
    # These are files, which are written and locked each time.
    fuzz(grammar, read_from, examples // 10 if grammar in ("journals", "manifests") else examples)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("mesh=data=²", "expected axis=size,axis=size"),
        (f"mesh=data={'9' * 5000}", "expected axis=size,axis=size"),
        ("strategy=pipeline", r"pipeline needs micro_batches, as in pipeline\(micro_batches=4\)"),
        ("optimizer.lr=nan", "expected float, got 'nan'"),
        ("optimizer.lr=inf", "expected float, got 'inf'"),
        ("train.steps=100000000000000000000000", "expected int, got"),
        ("strategy.params.table=x", "has no fields"),
    ],
)
def test_what_cannot_be_a_value_is_said(text, why):
    with pytest.raises(sk.ShardkitError, match=why):
        set_field(text)


def change(document, *path, to):
    fields = node = json.loads(document)
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = to
    return json.dumps(fields)


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("version",), "\x1b[2J"),
        (("mesh", 0, 1), 0),
        (("ledger", "rows", 0, "wire_bytes"), float("nan")),
        (("flops", "model"), 0),
    ],
)
def test_a_report_of_odd_numbers_is_shown_or_refused(path, to, step):
    with contextlib.suppress(sk.errors.ReportError):
        read_report(change(step.report().to_json(), *path, to=to))


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("leaves", "state/key", "key"), "x"),
        (("leaves", "drawn", "dtype"), "key<fry>"),
        (("leaves", "drawn", "dtype"), "object"),
        (("versions", "jax"), "\x1b[2J"),
    ],
)
def test_a_manifest_of_odd_words_is_damaged(path, to, read_manifest, capsys):
    read, text = read_manifest
    read(change(text, *path, to=to))
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert ("damaged" in shown.out + shown.err) == (path[0] == "leaves")


def test_control_characters_in_names_reach_no_terminal(tmp_path, capsys):
    state = {"w\x1b[2J": jnp.ones(4), "b\r": jnp.ones(4)}
    sk.Checkpointer(tmp_path).save(1, state)
    with pytest.raises(sk.ShardkitError) as error:
        sk.Checkpointer(tmp_path).restore({"w": jnp.ones(4)})
    assert main(["checkpoint", "inspect", str(tmp_path)]) == 0
    print_table(make_console(width=60), Table(["leaf"], [["w\x1b[2J"]]))
    shown = str(error.value) + capsys.readouterr().out
    assert "w\\x1b[2J" in shown
    assert not set(shown) & set("\x1b\r")
