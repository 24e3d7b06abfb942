"""Atomic files, locks, tables, and text for terminals and files."""

from ._console import make_console as make_console
from ._console import print_table as print_table
from ._files import FileInUseError as FileInUseError
from ._files import append_atomic as append_atomic
from ._files import file_lock as file_lock
from ._files import is_locked as is_locked
from ._files import local_path as local_path
from ._files import os_errors_as as os_errors_as
from ._files import path_problem as path_problem
from ._files import sync_folder as sync_folder
from ._files import write_atomic as write_atomic
from ._outputs import check_figure_path as check_figure_path
from ._outputs import check_outputs as check_outputs
from ._outputs import figure_file as figure_file
from ._outputs import write_output as write_output
from ._table import Column as Column
from ._table import Table as Table
from ._table import flatten as flatten
from ._table import fold_text as fold_text
