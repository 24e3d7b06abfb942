"""`shardkit init`, `config` and `completion`: what a user does before the first run."""

import argparse
import shutil
from collections.abc import Iterator

from .._core.errors import ConfigError, Problem, raise_all
from .._core.io._files import local_path


def run_init(arguments: argparse.Namespace) -> int:
    """Copies the shipped configs into a folder, to be changed."""
    from ..config import shipped_configs

    folder = local_path(arguments.folder, ConfigError, "The configs cannot be copied.")
    files = shipped_configs()
    if folder.exists() and not folder.is_dir():
        problem = Problem(str(folder), "is a file, not a folder")
        raise_all(ConfigError, "The configs cannot be copied.", [problem], "shardkit init configs")
    taken = [
        Problem(str(folder / file.name), "exists already")
        for file in files
        if (folder / file.name).exists()
    ]
    fix = "shardkit init another-folder, or remove them"
    raise_all(ConfigError, "The configs cannot be copied.", taken, fix)
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    print(f"{folder}: {', '.join(file.name for file in files)}")
    print(f"Try: shardkit train {folder / 'nano.py'}")
    return 0


def run_config(arguments: argparse.Namespace) -> int:
    """Prints every field of a config: its value, type, default, and what set it."""
    from .._core.io._console import make_console, print_table
    from .._core.io._table import Column, Table
    from ..config import describe_fields

    rows = describe_fields(arguments.config, arguments.overrides)
    columns = ["field", Column("value", most=24), Column("type", most=28), "default", "set by"]
    cells = [
        [row.path, row.value, row.kind, "" if row.origin == "default" else row.default, row.origin]
        for row in rows
    ]
    styles = {at: "bold" for at, row in enumerate(rows) if row.origin != "default"}
    print_table(make_console(soft_wrap=True), Table(columns, cells, styles=styles))
    return 0


_BASH = """\
# Completion of shardkit. bash: source this. zsh: the same, after its first two lines.
_shardkit() {
  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "@COMMANDS@ --help --version" -- "$cur"))
    return
  fi
  if [ "$prev" = --set ]; then
    compopt -o nospace 2>/dev/null
    COMPREPLY=($(compgen -S = -W "@FIELDS@" -- "$cur"))
    return
  fi
  case ${COMP_WORDS[1]} in
@CASES@
  esac
  if [ "${cur#-}" = "$cur" ]; then
    COMPREPLY=($(compgen -W "$words" -- "$cur" | grep -v '^-') $(compgen -f -- "$cur"))
  else
    COMPREPLY=($(compgen -W "$words --help" -- "$cur"))
  fi
}
complete -o filenames -F _shardkit shardkit
"""
_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def run_completion(arguments: argparse.Namespace) -> int:
    """Prints the completion script of a shell."""
    from ..config import describe_fields

    cases = [f'    {name}) words="{" ".join(words)}" ;;' for name, words in _list_words()]
    fields = {
        "@COMMANDS@": " ".join(name for name, _ in _list_words()),
        "@FIELDS@": " ".join(row.path for row in describe_fields()),
        "@CASES@": "\n".join(cases),
    }
    script = _BASH
    for mark, text in fields.items():
        script = script.replace(mark, text)
    print((_ZSH if arguments.shell == "zsh" else "") + script, end="")
    return 0


def _list_words() -> Iterator[tuple[str, list[str]]]:
    """Yields `(command, its options, its fixed arguments and the shipped configs)`."""
    from ..config import shipped_configs
    from ._commands import COMMANDS

    names = [file.stem for file in shipped_configs()]
    for command in COMMANDS:
        parser = argparse.ArgumentParser(add_help=False)
        command.add_options(parser)
        words = [name for action in parser._actions for name in action.option_strings]
        words += [str(choice) for action in parser._actions for choice in action.choices or ()]
        takes_config = any(action.dest == "config" for action in parser._actions)
        yield command.name, [*words, *(names if takes_config else ())]
