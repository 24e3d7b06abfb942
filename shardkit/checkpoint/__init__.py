"""Checkpoints: whole or absent, proved bit by bit, and restored onto any mesh."""

from ._checkpointer import Checkpointer
from ._fingerprint import as_text, fingerprints
from ._keep import Keep
from ._manifest import Manifest, SavedFile, SavedLeaf
from ._restore import Restored
from ._safetensors import export_safetensors, import_safetensors
from ._step import SavedStep

__all__ = [
    "Checkpointer",
    "Keep",
    "Manifest",
    "Restored",
    "SavedFile",
    "SavedLeaf",
    "SavedStep",
    "as_text",
    "export_safetensors",
    "fingerprints",
    "import_safetensors",
]
