"""Text as bytes: corpora, the split by file, batches by global row, and compressor baselines."""

from ._baselines import Baselines, measure_baselines
from ._corpus import Corpus, read_corpus, standard_library
from ._process import place_rows, process_rows, rows_of_shardings
from ._windows import Batch, DataConfig, Text, load_text

__all__ = [
    "Baselines",
    "Batch",
    "Corpus",
    "DataConfig",
    "Text",
    "load_text",
    "measure_baselines",
    "place_rows",
    "process_rows",
    "read_corpus",
    "rows_of_shardings",
    "standard_library",
]
