"""What needs no network at all, in bits per byte of the same held-out bytes.

A byte model is only as good as the compressors it beats. The two counting models are fitted on
the training bytes, as the network is. gzip and xz see the held-out bytes alone; xz is also given
the training bytes first, which is the fair match for a network that has read them.
"""

import dataclasses
import gzip
import lzma
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ._corpus import Corpus


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Bits per held-out byte.

    Attributes:
      order0: entropy coding with byte frequencies of the training text, add-one smoothed.
      bigram: the same with frequencies given the byte before.
      gzip: `gzip -9` of the held-out bytes alone.
      xz: `xz -9` of the held-out bytes alone.
      xz_after_train: what the held-out bytes add to `xz -9` of the training bytes; at most
        `limit` of those, the nearest ones.
      n: held-out bytes that each number is a mean over.
    """

    order0: float
    bigram: float
    gzip: float
    xz: float
    xz_after_train: float
    n: int


def measure_baselines(corpus: Corpus, limit: int = 16 * 2**20) -> Baselines:
    """Scores the compressors on a corpus's held-out bytes.

    Args:
      corpus: the two parts.
      limit: most training bytes that `xz_after_train` reads; 16 MiB takes about ten seconds.
    """
    train, held_out = corpus.train, corpus.held_out
    prefix = train[-limit:]
    # lzma lets go of the interpreter lock: the two large compressions share two cores.
    with ThreadPoolExecutor(2) as pool:
        both, first = pool.map(_xz_size, (prefix + held_out, prefix))
    bits = 8 / len(held_out)
    return Baselines(
        order0=order0_bits(train, held_out),
        bigram=bigram_bits(train, held_out),
        gzip=bits * len(gzip.compress(held_out, 9, mtime=0)),
        xz=bits * _xz_size(held_out),
        xz_after_train=bits * (both - first),
        n=len(held_out),
    )


def order0_bits(train: bytes, held_out: bytes) -> float:
    """Bits per held-out byte under the training text's byte frequencies, each count plus one."""
    counts = np.bincount(np.frombuffer(train, np.uint8), minlength=256) + 1.0
    cost = np.log2(counts.sum() / counts)
    return float(cost[np.frombuffer(held_out, np.uint8)].mean())


def bigram_bits(train: bytes, held_out: bytes) -> float:
    """Bits per held-out byte given the byte before (zero before the first), counts plus one."""
    counts = np.bincount(_pairs(train), minlength=256 * 256).reshape(256, 256) + 1.0
    cost = np.log2(counts.sum(axis=1, keepdims=True) / counts)
    return float(cost.ravel()[_pairs(held_out)].mean())


def _pairs(text: bytes) -> np.ndarray:
    stream = np.frombuffer(b"\0" + text, np.uint8).astype(np.int64)
    return stream[:-1] * 256 + stream[1:]


def _xz_size(text: bytes) -> int:
    return len(lzma.compress(text, preset=9))
