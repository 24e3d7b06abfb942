"""Compressors and counting models: bits per byte of the validation bytes that a model is scored on.

A byte model is only as good as the compressors it beats. The two counting models are fitted to
the training bytes, as the network is. gzip and xz read the validation bytes alone. xz also gets
the training bytes first, which makes a fair comparison with a network that was trained on them.
"""

import dataclasses
import gzip
import lzma
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ._corpus import Corpus


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Bits per validation byte."""

    order0: float  # entropy coding with byte frequencies of the training text, add-one smoothed
    bigram: float  # the same with frequencies given the byte before
    gzip: float  # `gzip -9` of the validation bytes alone
    xz: float  # `xz -9` of the validation bytes alone
    # what the validation bytes add to `xz -9` of the last `limit` training bytes
    xz_after_train: float
    n: int  # number of validation bytes


def measure_baselines(corpus: Corpus, limit: int = 16 * 2**20) -> Baselines:
    """Scores the compressors on a corpus's validation bytes.

    Args:
      corpus: training and validation bytes.
      limit: most training bytes that `xz_after_train` reads; 16 MiB takes about ten seconds.
    """
    train, validation = corpus.train, corpus.validation
    prefix = train[-limit:]
    # lzma releases the interpreter lock, so the two large compressions use two cores.
    with ThreadPoolExecutor(2) as pool:
        both, prefix_alone = pool.map(_xz_size, (prefix + validation, prefix))
    bits = 8 / len(validation)
    return Baselines(
        order0=order0_bits(train, validation),
        bigram=bigram_bits(train, validation),
        gzip=bits * len(gzip.compress(validation, 9, mtime=0)),
        xz=bits * _xz_size(validation),
        xz_after_train=bits * (both - prefix_alone),
        n=len(validation),
    )


def order0_bits(train: bytes, validation: bytes) -> float:
    """Bits per validation byte under the training text's byte frequencies, each count plus one."""
    counts = np.bincount(np.frombuffer(train, np.uint8), minlength=256) + 1.0
    cost = np.log2(counts.sum() / counts)
    return float(cost[np.frombuffer(validation, np.uint8)].mean())


def bigram_bits(train: bytes, validation: bytes) -> float:
    """Bits per validation byte given the byte before (zero before the first), counts plus one."""
    counts = np.bincount(_byte_pairs(train), minlength=256 * 256).reshape(256, 256) + 1.0
    cost = np.log2(counts.sum(axis=1, keepdims=True) / counts)
    return float(cost.ravel()[_byte_pairs(validation)].mean())


def _byte_pairs(text: bytes) -> np.ndarray:
    """Each byte with the one before it, as 256 · before + byte."""
    stream = np.frombuffer(b"\0" + text, np.uint8).astype(np.int64)
    return stream[:-1] * 256 + stream[1:]


def _xz_size(text: bytes) -> int:
    return len(lzma.compress(text, preset=9))
