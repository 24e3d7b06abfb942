"""Checkpoints: complete or absent, verified bit by bit, and restored onto any mesh."""

from ._checkpointer import Checkpointer
from ._fingerprint import compute_fingerprints, fingerprint, format_fingerprint
from ._host_fingerprint import fingerprint_values
from ._manifest import Manifest, SavedFile, SavedLeaf
from ._restore import Restored
from ._retention import RetentionPolicy
from ._safetensors import export_safetensors, import_safetensors, open_safetensors
from ._step import SavedStep

__all__ = [
    "Checkpointer",
    "Manifest",
    "Restored",
    "RetentionPolicy",
    "SavedFile",
    "SavedLeaf",
    "SavedStep",
    "compute_fingerprints",
    "export_safetensors",
    "fingerprint",
    "fingerprint_values",
    "format_fingerprint",
    "import_safetensors",
    "open_safetensors",
]
