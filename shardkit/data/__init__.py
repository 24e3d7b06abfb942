"""Data as a function of the step: text, token shards, arrays; packed, shuffled, read ahead."""

from ._arrays import Arrays, Dataset
from ._baselines import Baselines, measure_baselines
from ._batch_source import BatchSource, ScoredSource, resume_step
from ._config import DataConfig
from ._corpus import Corpus
from ._examples import Examples, load_examples, load_source
from ._loader import Loader
from ._process import place_rows, process_rows, rows_of_shardings
from ._read_text import read_corpus, read_standard_library
from ._sequences import TokenBatch, segment_positions
from ._shards import open_shards, verify_shards, write_tokens
from ._stream import Stream
from ._text import Text, load_text
from ._tokenize import tokenize
from ._tokenizer import BYTES

__all__ = [
    "BYTES",
    "Arrays",
    "Baselines",
    "BatchSource",
    "Corpus",
    "DataConfig",
    "Dataset",
    "Examples",
    "Loader",
    "ScoredSource",
    "Stream",
    "Text",
    "TokenBatch",
    "load_examples",
    "load_source",
    "load_text",
    "measure_baselines",
    "open_shards",
    "place_rows",
    "process_rows",
    "read_corpus",
    "read_standard_library",
    "resume_step",
    "rows_of_shardings",
    "segment_positions",
    "tokenize",
    "verify_shards",
    "write_tokens",
]
