"""Atomic files, locks, tables, and text for terminals and files."""

from ._console import make_console, print_table
from ._files import (
    FileInUseError,
    append_atomic,
    file_lock,
    is_locked,
    local_path,
    os_errors_as,
    path_problem,
    sync_folder,
    write_atomic,
)
from ._outputs import check_figure_path, check_outputs, figure_file, write_output
from ._table import Column, Table, flatten, fold_text

__all__ = [
    "Column",
    "FileInUseError",
    "Table",
    "append_atomic",
    "check_figure_path",
    "check_outputs",
    "figure_file",
    "file_lock",
    "flatten",
    "fold_text",
    "is_locked",
    "local_path",
    "make_console",
    "os_errors_as",
    "path_problem",
    "print_table",
    "sync_folder",
    "write_atomic",
    "write_output",
]
