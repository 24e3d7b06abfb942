"""How much damage to a checkpoint goes unnoticed: a thousand random damages, one at a time.

    python benchmarks/corruption.py [--count 1000]

A state of about 1 MB is saved from a mesh of 8 simulated devices. Then, again and again, one
random file of it is damaged, and the step is looked at as a restore does before it puts anything
on a device. A damage that the look does not report is silent, whatever the values then are.
"""

import argparse
import pathlib
import random
import shutil
import tempfile
from collections.abc import Callable

import _harness
import jax

import shardkit as sk
from shardkit.checkpoint import SavedStep

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


CLASSES: dict[str, Callable[[pathlib.Path, random.Random], None]] = {
    "single-bit flip": flip,
    "zeroed page": zero,
    "truncation": cut,
    "deleted file": delete,
    "swapped files": swap,
    "half-written metadata": half_metadata,
}


def files(root: pathlib.Path) -> list[pathlib.Path]:
    """Every file below a folder, in one order."""
    return sorted(path for path in root.rglob("*") if path.is_file())


def snapshot(root: pathlib.Path) -> dict[pathlib.Path, bytes]:
    """Every file with its bytes."""
    return {path: path.read_bytes() for path in files(root)}


def save(folder: pathlib.Path) -> pathlib.Path:
    """One step of a decoder-like state, split over a mesh."""
    mesh = sk.MeshSpec(data=2, tensor=4).build("cpu:8")
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "tensor"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    keys = jax.random.split(jax.random.key(0), 8)
    state = {f"w{i}": jax.device_put(jax.random.normal(k, (256, 128)), split)
             for i, k in enumerate(keys)}  # fmt: skip
    state |= {"scale": jax.device_put(jax.random.normal(keys[0], (128,)), whole)}
    state |= {"step": jax.device_put(jax.numpy.int32(7), whole)}
    sk.Checkpointer(folder).save(7, state, data={"batch": 7})
    return folder / "step-00000007"


def found(root: pathlib.Path) -> bool:
    """Whether the look before a restore reports damage."""
    try:
        SavedStep.open(root).check_files()
    except sk.errors.CheckpointCorruptedError:
        return True
    return False


def main() -> None:
    """Damages, looks, repairs, and counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    arguments = parser.parse_args()
    sk.simulate_devices(8)
    work = pathlib.Path(tempfile.mkdtemp())
    root, rng = save(work), random.Random(0)
    whole = snapshot(root)
    assert not found(root), "an undamaged step must not be reported"
    tally = {name: {"damages": 0, "found": 0, "silent": 0} for name in CLASSES}
    while sum(row["damages"] for row in tally.values()) < arguments.count:
        name = rng.choice(list(CLASSES))
        full = [path for path in whole if whole[path] or name == "deleted file"]
        CLASSES[name](rng.choice(full), rng)
        if snapshot(root) != whole:  # zeroing zeros, or swapping equals, damages nothing
            row = tally[name]
            row["damages"] += 1
            row["found" if found(root) else "silent"] += 1
        for path, content in whole.items():
            path.write_bytes(content)
    rows = [{"class": name, **row} for name, row in tally.items()]
    total = {key: sum(row[key] for row in tally.values()) for key in ("damages", "found", "silent")}
    note = (
        f"One damage at a time to one of {len(whole)} files, "
        f"{sum(map(len, whole.values())):,} bytes; `found` by sizes, CRC-32 and the manifest's own "
        "checksum, before anything is put on a device."
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
