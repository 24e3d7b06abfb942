"""Which weights a folder holds, in 8 digits that take seconds for any model."""

import os
import zlib

import numpy as np

from .._core.errors import CheckpointError
from .._core.io._files import local_path, os_errors_as
from ._config import CONFIG
from ._tensor_files import read_folder

# Folders with more bytes have a checksum of so many blocks of each tensor.
_MAX_FULL, _BLOCKS, _BLOCK = 2**26, 4, 2**16


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Returns a CRC-32 of a folder's configuration and weights, as 8 hexadecimal digits.

    It covers names, shapes and dtypes of all tensors, and their bytes: all of at most 64 MiB,
    else four blocks of 64 KiB in each tensor, evenly spaced. How tensors are divided into files
    does not matter.

    Raises:
      CheckpointError: the folder cannot be read.
    """
    headline = "The weights cannot be read."
    folder = local_path(path, CheckpointError, headline)
    tensors = read_folder(folder)
    with os_errors_as(CheckpointError, headline, folder, "a folder that save_pretrained made"):
        crc = zlib.crc32((folder / CONFIG).read_bytes())
        whole = sum(tensor.nbytes for tensor in tensors.values()) <= _MAX_FULL
        for name, tensor in sorted(tensors.items()):
            crc = zlib.crc32(f"{name} {tensor.type}".encode(), crc)
            data = tensor.map().reshape(-1).view(np.uint8)
            starts = np.linspace(0, max(0, data.size - _BLOCK), _BLOCKS, dtype=np.int64)
            blocks = [data] if whole else [data[at : at + _BLOCK] for at in starts.tolist()]
            for block in blocks:
                crc = zlib.crc32(block.tobytes(), crc)
    return f"{crc:08x}"


def stored_dtype(path: str | os.PathLike[str]) -> str:
    """The dtype of most of a folder's numbers; raises CheckpointError if it cannot be read."""
    sizes: dict[str, int] = {}
    for tensor in read_folder(local_path(path, CheckpointError)).values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default="float32")
