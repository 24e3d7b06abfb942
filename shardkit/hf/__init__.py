"""Hugging Face checkpoints in and out: weights onto any mesh, and folders for `transformers`."""

from ._config import decoder_config, find_family
from ._family import ModelFamily
from ._fingerprint import fingerprint
from ._load import load
from ._save import save
from ._table import Table
from .families import FAMILIES

__all__ = [
    "FAMILIES",
    "ModelFamily",
    "Table",
    "decoder_config",
    "find_family",
    "fingerprint",
    "load",
    "save",
]
