"""What a user does before the first run: help, completion, configs of one's own, fields."""

import dataclasses
import re
import shlex
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest

from shardkit._core.startup import check_platform
from shardkit.cli import _main as entry
from shardkit.cli import main
from shardkit.cli._commands import COMMANDS
from shardkit.config import Config, describe_fields, load_config, shipped_configs
from shardkit.lm._decoder_config import ATTENTIONS
from shardkit.nn._remat import _NAMED as REMAT
from shardkit.run.callbacks._loggers import LOGGERS

ROOT = Path(__file__).parent.parent
EXAMPLES = [(command.name, line) for command in COMMANDS for line in command.examples]


@pytest.mark.parametrize(("name", "line"), EXAMPLES)
def test_an_example_of_a_help_can_be_typed(name, line, monkeypatch):
    words = shlex.split(line.split(" > ")[0])
    assert words[:2] == ["shardkit", name]
    arguments = entry.parser().parse_args(words[1:])
    config = vars(arguments).get("config")
    if config and ":" not in config and not config.endswith(".json"):
        load_config(config, arguments.overrides)


def test_every_help_has_examples_and_fits_60_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command.name, "--help"])
        text = capsys.readouterr().out
        assert f"examples:\n  shardkit {command.name}" in text
        body = text.split("examples:")[0]
        assert max(map(len, body.splitlines())) <= 60, command.name


def test_short_forms_are_overrides_and_the_last_one_wins():
    words = "train nano --steps 20 --lr 1e-2 --set train.steps=30 --mesh data=8 --seed 3 --name me"
    arguments = entry.parser().parse_args(words.split())
    config = load_config(arguments.config, arguments.overrides)
    assert (config.train.steps, config.optimizer.lr, config.train.seed) == (30, 0.01, 3)
    assert (config.mesh.axes, config.name) == ({"data": 8}, "me")
    arguments = entry.parser().parse_args(["train", "--steps", "20"])
    assert load_config(None, arguments.overrides).train.steps == 20
    assert entry.parser().parse_args(["train"]).overrides == []


def test_every_field_is_shown_with_what_set_it(capsys):
    words = ["config", "show", "nano", "--set", "train.steps=50", "--set", "mesh=data=8"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", lines[0]) == ["field", "value", "type", "default", "set by"]
    rows = {line.split()[0]: re.split(r"  +", line) for line in lines[1:]}
    assert rows["train.steps"] == ["train.steps", "50", "int", "400", "--set"]
    assert rows["model.embed_dim"] == ["model.embed_dim", "64", "int", "128", "nano"]
    assert rows["model.vocab"] == ["model.vocab", "256", "int", "default"]
    assert rows["train.resume"][2] == "auto, never or the folder of a run"
    assert rows["optimizer.name"][2] == "adamw or lion or muon or sgd"
    assert rows["mesh.data"][-1] == "--set"
    assert "mesh.tensor" not in rows


def test_what_is_allowed_is_what_the_checks_compare():
    kinds = {row.path: row.kind for row in describe_fields()}
    assert set(re.split(r", | or ", kinds["model.attention"])) == set(ATTENTIONS)
    assert kinds["train.loggers"].split(",") == list(LOGGERS)
    assert set(REMAT) <= set(re.split(r", | or ", kinds["strategy.remat"]))
    for path, kind in kinds.items():
        first = re.split(r", | or |,", kind)[0]
        if path in ("model.attention", "strategy.remat", "strategy.precision", "compile.mode"):
            load_config(None, [f"{path}={first}"])


def test_a_table_is_folded_to_60_columns_and_loses_nothing():
    rows = describe_fields("nano")
    from shardkit._core.io._table import Column, Table

    cells = [[row.path, row.value, row.kind] for row in rows]
    table = Table(["field", Column("value", most=24), Column("type", most=28)], cells)
    lines = table.to_text(60).splitlines()
    assert max(map(len, lines)) <= 60
    assert "…" not in table.to_text(60)
    wide = table.to_text()
    assert all(row.path in wide and row.kind in wide for row in rows)


def test_init_copies_the_configs_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine"]) == 0
    names = [file.name for file in shipped_configs()]
    assert sorted(file.name for file in Path("mine").iterdir()) == names
    assert "shardkit train mine/nano.py" in capsys.readouterr().out
    assert load_config("mine/nano.py") == load_config("nano")
    Path("mine/nano.py").write_text("changed")
    assert main(["init", "mine"]) == 2
    error = capsys.readouterr().err
    assert "mine/nano.py  " in error
    assert "exists already" in error
    assert Path("mine/nano.py").read_text() == "changed"
    assert main(["init", "mine/nano.py"]) == 2
    assert "is a file, not a folder" in capsys.readouterr().err


def complete(script: Path, line: str) -> list[str]:
    """What bash offers behind the last word of a line."""
    words = [*line.split(" ")]
    code = f"""
      . {script}
      COMP_WORDS=({" ".join(shlex.quote(word) for word in words)}); COMP_CWORD={len(words) - 1}
      _shardkit; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    run = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return run.stdout.split()


def test_bash_completes_commands_options_configs_and_fields(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    assert complete(script, "shardkit tr") == ["train"]
    assert "config" in complete(script, "shardkit ")
    assert complete(script, "shardkit train na") == ["nano", "nano_moe"]
    assert "--profile" in complete(script, "shardkit train --")
    assert "--profile" not in complete(script, "shardkit verify --")
    assert complete(script, "shardkit train --set train.ste") == [
        "train.steps=",
        "train.step_timeout=",
    ]
    assert complete(script, "shardkit checkpoint v") == ["verify"]
    assert main(["completion", "zsh"]) == 0
    zsh = capsys.readouterr().out
    assert zsh.endswith(script.read_text())
    assert "bashcompinit" in zsh


def test_windows_is_refused_with_a_sentence(monkeypatch):
    check_platform()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ImportError, match=r"does not run on Windows.*WSL 2"):
        check_platform()
    assert "check_platform()" in (ROOT / "shardkit" / "__init__.py").read_text()


def test_every_field_of_the_tree_is_a_row():
    def leaves(cls, where=""):
        for name, kind in typing.get_type_hints(cls).items():
            # The decoder of `Config()` is the first of those that it may be.
            if isinstance(kind, types.UnionType):
                kind = next(filter(dataclasses.is_dataclass, typing.get_args(kind)), kind)
            if name in ("mesh", "strategy"):
                yield f"{where}{name}"
            elif dataclasses.is_dataclass(kind):
                yield from leaves(kind, f"{where}{name}.")
            else:
                yield f"{where}{name}"

    shown = {re.sub(r"^(mesh|strategy)\..*", r"\1", row.path) for row in describe_fields()}
    assert shown == set(leaves(Config))
