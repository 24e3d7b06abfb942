"""Files of somebody else: JSON that every reader reads alike, and links out of a folder."""

import json
import os
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Parses JSON whose objects have each name once: readers differ in which one they take.

    Raises ValueError if it is none, RecursionError if it is too deep.

    >>> parse_json('{"rank": 8, "rank": 16}')
    Traceback (most recent call last):
    ValueError: 'rank' is there twice
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
        return values

    return json.loads(text, object_pairs_hook=once)


def is_own(path: Path) -> bool:
    """Whether a file is in its folder, or a link into the blobs of the cache that the folder is of.

    `huggingface_hub` caches `<model>/snapshots/<commit>/config.json -> ../../blobs/<hash>`.
    """
    folder, target = path.parent.resolve(), Path(os.path.realpath(path))
    caches = [above.parent / "blobs" for above in folder.parents if above.name == "snapshots"]
    return any(root in target.parents for root in (folder, *caches))
