"""How much damage to a checkpoint goes unnoticed: a thousand random damages, one at a time.

    python benchmarks/corruption.py [--count 1000]

Two steps of about 1 MB are saved from a mesh of 8 simulated devices. Then, again and again, the
newest is damaged at random and restored onto the mesh: also with checksums that are made right
again, and with folders that change their names. A damage is silent if the restore returns other
bits than those of the step that it names. What is not found and returns the right bits has hit
what a restore does not use, such as the time of the save.
"""

import argparse
import json
import pathlib
import random
import shutil
import tempfile
import zlib
from collections.abc import Callable
from typing import Any

import _harness
import jax
import numpy as np

import shardkit as sk

PAGE = 4096


def flip(path: pathlib.Path, rng: random.Random) -> None:
    """One bit of one byte."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def zero(path: pathlib.Path, rng: random.Random) -> None:
    """One page of the file system, or what there is of it."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(-(-len(content) // PAGE)) * PAGE
    end = min(start + PAGE, len(content))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def cut(path: pathlib.Path, rng: random.Random) -> None:
    """Everything behind some byte."""
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def delete(path: pathlib.Path, rng: random.Random) -> None:
    """The file."""
    path.unlink()


def swap(path: pathlib.Path, rng: random.Random) -> None:
    """The file with another one of the step."""
    root = next(one for one in path.parents if one.name.startswith("step-"))
    other = rng.choice([one for one in files(root) if one != path])
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def half_metadata(path: pathlib.Path, rng: random.Random) -> None:
    """A file about the others, written up to some byte, the rest zeros as a lost page has them."""
    root = next(one for one in path.parents if one.name.startswith("step-"))
    metadata = [one for one in files(root) if one.suffix == ".json" or one.name[:1] in "._"]
    target = rng.choice([one for one in metadata if one.stat().st_size])
    content = target.read_bytes()
    end = rng.randrange(len(content))
    target.write_bytes(content[:end] + bytes(len(content) - end))


def step_of(path: pathlib.Path) -> pathlib.Path:
    """The folder of the step that a file is part of."""
    return next(one for one in path.parents if one.name.startswith("step-"))


def rename(path: pathlib.Path, rng: random.Random) -> None:
    """The step's folder, to the name of a later step."""
    root = step_of(path)
    root.rename(root.with_name(f"step-{rng.randrange(9, 999):08d}"))


def swap_steps(path: pathlib.Path, rng: random.Random) -> None:
    """The folders of both steps."""
    one, other = sorted(step_of(path).parent.glob("step-*"))
    one.rename(one.with_name("aside"))
    other.rename(one)
    one.with_name("aside").rename(other)


def resum(root: pathlib.Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the fields of a manifest, and makes its checksum right again."""
    path = root / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["crc32"]
    change(fields)
    text = json.dumps(fields, indent=1) + "\n"
    fields["crc32"] = f"{zlib.crc32(text.encode()):08x}"
    path.write_text(json.dumps(fields, indent=1) + "\n")


def resum_manifest(path: pathlib.Path, rng: random.Random) -> None:
    """One value of the manifest removed or replaced, with its checksum right."""

    def change(node: Any) -> None:
        while True:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.2:
                break
            node = node[key]
        if rng.random() < 0.3:
            del node[key]
        else:
            node[key] = rng.choice([None, -1, 0, 3, 7, "x", "../x", "f" * 16, [], {}, 1.5, True])

    resum(step_of(path), change)


def _make_right(root: pathlib.Path, *paths: pathlib.Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        for path in paths:
            content, name = path.read_bytes(), str(path.relative_to(root))
            fields["files"][name] = {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}

    resum(root, change)


def resum_file(path: pathlib.Path, rng: random.Random) -> None:
    """One bit of a file, with all checksums right."""
    root = step_of(path)
    path = rng.choice([one for one in files(root / "arrays") if one.stat().st_size])
    flip(path, rng)
    _make_right(root, path)


def resum_swap(path: pathlib.Path, rng: random.Random) -> None:
    """Two files of one size, with all checksums right."""
    root = step_of(path)
    found = files(root / "arrays")
    one = rng.choice(found)
    same = [p for p in found if p != one and p.stat().st_size == one.stat().st_size]
    other = rng.choice(same or found)
    mine, theirs = one.read_bytes(), other.read_bytes()
    one.write_bytes(theirs)
    other.write_bytes(mine)
    _make_right(root, one, other)


CLASSES: dict[str, Callable[[pathlib.Path, random.Random], None]] = {
    "single-bit flip": flip,
    "zeroed page": zero,
    "truncation": cut,
    "deleted file": delete,
    "swapped files": swap,
    "half-written metadata": half_metadata,
    "renamed step": rename,
    "swapped steps": swap_steps,
    "manifest with right checksum": resum_manifest,
    "bit flip with right checksums": resum_file,
    "swapped files with right checksums": resum_swap,
}


def files(root: pathlib.Path) -> list[pathlib.Path]:
    """Every file below a folder, in one order."""
    return sorted(path for path in root.rglob("*") if path.is_file())


def snapshot(root: pathlib.Path) -> dict[pathlib.Path, bytes]:
    """Every file with its bytes."""
    return {path: path.read_bytes() for path in files(root)}


def make_state(step: int) -> dict[str, jax.Array]:
    """A decoder-like state, split over a mesh."""
    mesh = sk.MeshSpec(data=2, tensor=4).build("cpu:8")
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "tensor"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    keys = jax.random.split(jax.random.key(step), 8)
    state = {f"w{i}": jax.device_put(jax.random.normal(k, (256, 128)), split)
             for i, k in enumerate(keys)}  # fmt: skip
    state |= {"scale": jax.device_put(jax.random.normal(keys[0], (128,)), whole)}
    return state | {"step": jax.device_put(jax.numpy.int32(step), whole)}


def restore(folder: pathlib.Path, states: dict[int, dict[str, jax.Array]]) -> str:
    """Restores the newest step; returns `found`, `unchanged` or `silent`."""
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), states[7])
    shardings = jax.tree.map(lambda x: x.sharding, states[7])
    try:
        back = sk.Checkpointer(folder).restore(wanted, shardings)
    except sk.errors.CheckpointError:
        return "found"
    saved = states.get(back.step, {})
    same = all(
        np.asarray(back.state[name]).tobytes() == np.asarray(x).tobytes()
        for name, x in saved.items()
    )
    return "unchanged" if saved and same else "silent"


def main() -> None:
    """Damages, restores, repairs, and counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    arguments = parser.parse_args()
    sk.simulate_devices(8)
    work = pathlib.Path(tempfile.mkdtemp())
    saved, copy, rng = work / "saved", work / "copy", random.Random(0)
    states = {step: make_state(step) for step in (6, 7)}
    with sk.Checkpointer(saved) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, data={"batch": step})
    whole = snapshot(saved / "step-00000007")
    assert restore(saved, states) == "unchanged", "an undamaged step must not be reported"
    tally = {name: {"damages": 0, "found": 0, "unchanged": 0, "silent": 0} for name in CLASSES}
    while sum(row["damages"] for row in tally.values()) < arguments.count:
        name = rng.choice(list(CLASSES))
        shutil.copytree(saved, copy)
        full = [path for path in whole if whole[path] or name == "deleted file"]
        CLASSES[name](copy / rng.choice(full).relative_to(saved), rng)
        now = {path.relative_to(copy): content for path, content in snapshot(copy).items()}
        before = {path.relative_to(saved): content for path, content in snapshot(saved).items()}
        if now != before:  # zeroing zeros, or swapping equals, damages nothing
            row = tally[name]
            row["damages"] += 1
            row[restore(copy, states)] += 1
        shutil.rmtree(copy)
    rows = [{"class": name, **row} for name, row in tally.items()]
    total = {key: sum(row[key] for row in tally.values()) for key in rows[0] if key != "class"}
    note = (
        f"One damage at a time to the newest of two steps, {len(whole)} files of "
        f"{sum(map(len, whole.values())):,} bytes; `found` by names, sizes, CRC-32 and "
        "fingerprints of a restore; `unchanged` restored the bits that were saved: the damage hit "
        "what only people read, such as the time of the save."
    )
    _harness.write(
        "corruption",
        "measured",
        "8 simulated CPU devices",
        [*rows, {"class": "all", **total}],
        note,
    )
    shutil.rmtree(work)
    assert not total["silent"]


if __name__ == "__main__":
    main()
