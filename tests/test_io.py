"""Files are complete or absent, whatever the system refuses; tables keep every character."""

import io
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import pytest
from matplotlib.figure import Figure
from rich.console import Console

import shardkit as sk
from shardkit._core.io import (
    Column,
    FileInUseError,
    Table,
    append_atomic,
    check_outputs,
    figure_file,
    file_lock,
    flatten,
    fold_text,
    is_locked,
    make_console,
    print_table,
    write_atomic,
    write_output,
)
from shardkit.checkpoint import export_safetensors
from shardkit.data import write_tokens
from shardkit.sweeps._journal import sweep_file_errors

from ._damages import full_disk


def content(folder):
    """Name → bytes of every file, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def draw(path):
    figure = Figure()
    figure.subplots().plot([0, 1])
    with figure_file(path) as part:
        figure.savefig(part, format=path.suffix[1:])


def swept(path):
    with sweep_file_errors(path), write_atomic(path) as part:
        part.write_text("x" * 5000)


WRITERS = {
    "output.json": lambda path: write_output(path, "x" * 5000),
    "figure.png": draw,
    "figure.svg": draw,
    "rows.csv": swept,
    "tokens.bin": lambda path: write_tokens(path, [range(200)] * 50, vocabulary=300),
    "params.safetensors": lambda path: export_safetensors(path, {"w": jnp.ones((50, 50))}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_error_and_leaves_nothing(name, tmp_path):
    path = tmp_path / name
    with full_disk(), pytest.raises(sk.ShardkitError, match="File too large") as error:
        WRITERS[name](path)
    assert f"  {path}  " in str(error.value)
    assert "Fix: " in str(error.value)
    assert content(tmp_path) == {}
    WRITERS[name](path)
    assert list(content(tmp_path)) == [name]


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_in_place_of_the_file_is_one_error(name, tmp_path):
    path = tmp_path / name
    path.mkdir()
    with pytest.raises(sk.ShardkitError, match=r"Is a directory|exists already") as error:
        WRITERS[name](path)
    assert f"  {path}  " in str(error.value)
    assert content(tmp_path) == {name: None}


@pytest.mark.parametrize("name", [one for one in WRITERS if one != "output.json"])
@pytest.mark.parametrize("above", ["missing", "file"])
def test_a_missing_folder_is_one_error(name, above, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / above / name
    with pytest.raises(sk.ShardkitError, match=r"No such file or directory|Not a directory"):
        WRITERS[name](path)
    assert content(tmp_path) == {"file": b""}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_new_file_has_the_permissions_of_the_umask(name, umask, tmp_path):
    before = os.umask(umask)
    try:
        WRITERS[name](tmp_path / name)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_a_replaced_file_keeps_its_permissions_and_a_link_stays_a_link(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("before")
    real.chmod(0o640)
    link.symlink_to("real")
    with write_atomic(link, sync=True) as part:
        part.write_text("after")
    assert link.is_symlink()
    assert real.read_text() == "after"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


def test_an_interrupted_block_leaves_the_file_of_before(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def write(error):
        with write_atomic(path) as part:
            part.write_text("half")
            raise error

    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error):
            write(error)
    assert content(tmp_path) == {"file": b"before"}


def test_two_writers_of_one_path_do_not_meet(tmp_path):
    path, both = tmp_path / "file", threading.Barrier(2, timeout=10)

    def write(letter):
        with write_atomic(path) as part:
            part.write_text(letter * 1000)
            both.wait()
            assert part.read_text() == letter * 1000

    threads = [threading.Thread(target=write, args=[letter]) for letter in "ab"]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert path.read_text() in ("a" * 1000, "b" * 1000)
    assert list(content(tmp_path)) == ["file"]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_output(pipe, "text")
    reader.join()
    assert read == ["text"]
    assert pipe.is_fifo()


def test_text_is_utf_8_whatever_the_locale(tmp_path):
    code = (
        "import pathlib, sys; from shardkit._core.io import write_output;"
        "write_output(pathlib.Path(sys.argv[1]), '\\u2192 \\xb5s')"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "x").read_text("utf-8") == "→ µs"


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    append_atomic(file, "first\n", sync=True)
    with full_disk(10), pytest.raises(OSError, match="File too large"):
        append_atomic(file, "second\n")
    assert path.read_text() == "first\n"
    append_atomic(file, "third\n")
    os.close(file)
    assert path.read_text() == "first\nthird\n"


def test_one_process_holds_a_lock_at_a_time(tmp_path):
    path = tmp_path / "lock"
    assert not is_locked(path)
    with file_lock(path) as file:
        append_atomic(file, "held")
        assert is_locked(path)
        with pytest.raises(FileInUseError), file_lock(path):
            pass
    assert path.read_text() == "held"
    assert not is_locked(path)
    with file_lock(path):
        pass


def test_files_of_options_are_checked_together(tmp_path):
    (tmp_path / "file").write_text("")
    given = {"--json": str(tmp_path), "--html": str(tmp_path / "file" / "x"), "--csv": None}
    with pytest.raises(sk.errors.ConfigError) as error:
        check_outputs(given, "plan")
    assert f"--json {tmp_path}" in str(error.value)
    assert "is a folder, not a file" in str(error.value)
    assert "--html plan.html" in str(error.value)
    check_outputs({"--json": str(tmp_path / "new" / "x.json"), "--html": "-"})


def test_a_file_of_the_callers_own_code_is_named(tmp_path):
    def documents():
        yield [1]
        yield (tmp_path / "their.txt").read_text()

    with pytest.raises(sk.errors.DataError) as error:
        write_tokens(tmp_path / "x.bin", documents(), vocabulary=300)
    assert f"No such file or directory: {tmp_path / 'their.txt'}." in str(error.value)
    assert content(tmp_path) == {}


def test_an_empty_group_is_not_an_absent_one():
    assert flatten({"a": {}, "b": {"c": {"d": [1]}}}) == {"a": {}, "b.c.d": [1]}
    assert flatten({"a": {}}) != flatten({"b": {}})


# --- tables

LONG = "decoder/layers/attention/query/kernel"
TABLE = Table(
    ["leaf", "why", Column("bytes", right=True)],
    [[LONG, "is held whole by every device", "12.0 KiB"], ["a", "", "1 B"]],
)


def words(text):
    return "".join(text.split())


@pytest.mark.parametrize("width", [None, 100, 60, 40, 30])
def test_a_table_keeps_every_character_and_its_numbers_whole(width):
    text = TABLE.to_text(width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= (width or 100)
    assert all(line.endswith(("bytes", "12.0 KiB", "1 B")) for line in lines if "B" in line)
    assert sorted(words(text)) == sorted(words("leafwhybytes" + "".join(map("".join, TABLE.rows))))
    if width is None:
        assert len(lines) == 3


def test_numbers_are_never_cut_even_where_there_is_no_room():
    rows = [["layers/attention/query", "1,234,567,890 B"]]
    text = Table(["leaf", Column("bytes", right=True)], rows).to_text(5)
    header, first, *_ = text.splitlines()
    assert first == "layers/   1,234,567,890 B"
    assert len(header) == len(first)


def test_columns_are_aligned_whatever_the_characters():
    rows = [["日本", "x"], ["e\u0301", "x"], ["abcd", "x"]]
    assert Table(["", ""], rows).to_text().splitlines() == ["日本  x", "e\u0301     x", "abcd  x"]


def test_cells_and_headers_have_several_lines_and_a_text_is_a_line_of_its_own():
    rows = ["a heading", ["one\ntwo", "1"], ["three"]]
    table = Table(["name", Column("size\nGiB", right=True)], rows, indent=2)
    assert table.to_text().splitlines() == [
        "  name   size",
        "          GiB",
        "a heading",
        "  one       1",
        "  two",
        "  three",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_folds_and_a_pipe_does_not(terminal, capsys):
    console = make_console(width=40)
    console._force_terminal = terminal
    console.no_color = True
    print_table(console, Table(TABLE.columns, [["[/nope] :fire:", *row[1:]] for row in TABLE.rows]))
    out = capsys.readouterr().out
    assert "[/nope] :fire:" in out
    assert len(out.splitlines()) == (5 if terminal else 3)


def test_a_terminal_shows_the_styles_of_rows_and_names_as_they_are():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=40)
    print_table(console, Table(["name"], [["[/nope]"], [":fire:"]], styles={1: "red"}))
    header, plain, red = out.getvalue().splitlines()
    assert header == "\x1b[1mname\x1b[0m"
    assert plain == "[/nope]"
    assert red == "\x1b[31m:fire:\x1b[0m"


@pytest.mark.parametrize("width", range(1, 30))
def test_folded_text_is_the_text(width):
    text = "layers/attention  sends, and reduces\nit/over/tensor 日本語日本語"
    lines = fold_text(text, width)
    assert words("".join(lines)) == words(text)
    wide = {"日", "本", "語"}
    assert all(sum(1 + (c in wide) for c in line) <= max(width, 2) for line in lines)


def test_a_table_needs_no_rich_before_it_is_printed_on_a_console():
    package = Path(sk.__file__).parent
    code = f"""
import sys, types
sys.modules["shardkit"] = package = types.ModuleType("shardkit")
package.__path__ = [{str(package)!r}]
from shardkit._core.io import Table, make_console
Table(["a"], [["b"]]).to_text()
assert not {{"rich", "jax", "matplotlib"}} & set(sys.modules)
make_console()
assert "rich" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
