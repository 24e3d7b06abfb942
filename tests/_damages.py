"""A thousand ways to damage a checkpoint, among them those that make checksums right again."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import zlib
from pathlib import Path

from ._checkpoints import flip_bit


@contextlib.contextmanager
def full_disk(size=20):
    """No file of this process may grow beyond a size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)


WRONG = [None, -1, "x", [], {}, 1.5, True, [1], {"a": 1}, 0, 2, 7, "../../etc", "f" * 16]
HEADERS = ["{}", "[]", '{"chunks": [64, 8], "shape": [8, 64]}', '{"chunks": [1, 1]}']
KINDS = ["flip", "truncate", "delete", "rename", "swap", "resum", "resum file", "swap files"]
KINDS += ["copy leaf", "add", "folder", "pipe"]


def resum(step: Path, change) -> None:
    """Changes the fields of a manifest, and makes its checksum right again."""
    path = step / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["crc32"]
    change(fields)
    text = json.dumps(fields, indent=1) + "\n"
    fields["crc32"] = f"{zlib.crc32(text.encode()):08x}"
    path.write_text(json.dumps(fields, indent=1) + "\n")


def change_somewhere(node, rng: random.Random) -> None:
    """Removes one value of a tree of JSON, or replaces it by another."""
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        below = node[key]
        if not isinstance(below, dict | list) or not below or rng.random() < 0.3:
            break
        node = below
    if rng.random() < 0.3:
        del node[key]
    else:
        node[key] = rng.choice(WRONG)


def damage(root: Path, rng: random.Random) -> str:
    """Damages one of the steps 1, 2 and 3; returns how."""
    kind, number = rng.choice(KINDS), rng.choice([1, 2, 3])
    step = root / f"step-{number:08d}"
    files = sorted(path for path in step.rglob("*") if path.is_file())
    path, other = rng.choice(files), rng.choice(files)
    match kind:
        case "flip" if path.stat().st_size:
            flip_bit(path, rng)
        case "truncate" if path.stat().st_size:
            path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
        case "delete" | "folder" | "pipe":
            path.unlink()
            make = {"folder": os.mkdir, "pipe": os.mkfifo, "delete": lambda path: None}
            make[kind](path)
        case "rename":
            step.rename(root / f"step-{rng.choice([4, 5, 9]):08d}")
        case "swap":
            target = root / f"step-{number % 3 + 1:08d}"
            step.rename(root / "aside")
            target.rename(step)
            (root / "aside").rename(target)
        case "resum":
            resum(step, lambda fields: change_somewhere(fields, rng))
        case "resum file":
            header = step / "arrays/state/w/.zarray"
            header.write_text(rng.choice(HEADERS))
            raw = header.read_bytes()
            file = {"bytes": len(raw), "crc32": f"{zlib.crc32(raw):08x}"}
            name = str(header.relative_to(step))
            resum(step, lambda fields: fields["files"].update({name: file}))
        case "swap files":
            one, two = path.read_bytes(), other.read_bytes()
            path.write_bytes(two)
            other.write_bytes(one)
        case "copy leaf" if number > 1:
            shutil.rmtree(step / "arrays/state/w")
            shutil.copytree(root / "step-00000001/arrays/state/w", step / "arrays/state/w")
        case _:
            (step / "arrays" / "extra").write_text("x")
    return kind
