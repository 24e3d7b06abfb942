"""Checkpoints: complete or absent, verified bit by bit, and restored onto any mesh."""

from ._checkpointer import Checkpointer as Checkpointer
from ._fingerprint import compute_fingerprints as compute_fingerprints
from ._fingerprint import fingerprint as fingerprint
from ._fingerprint import format_fingerprint as format_fingerprint
from ._host_fingerprint import fingerprint_values as fingerprint_values
from ._manifest import Manifest as Manifest
from ._manifest import SavedFile as SavedFile
from ._manifest import SavedLeaf as SavedLeaf
from ._restore import Restored as Restored
from ._retention import RetentionPolicy as RetentionPolicy
from ._safetensors import export_safetensors as export_safetensors
from ._safetensors import import_safetensors as import_safetensors
from ._safetensors import open_safetensors as open_safetensors
from ._step import SavedStep as SavedStep
