"""Lines appended to a file, whole or not at all."""

import os


def append_whole(file: int, text: str, *, sync: bool = False) -> None:
    """Appends text to an open file, all of it: of what does not fit nothing stays behind.

    Args:
      file: descriptor, opened for appending.
      text: written as UTF-8.
      sync: whether it is to be on the disk at the end.

    Raises:
      OSError: there is no room.
    """
    before, rest = os.fstat(file).st_size, text.encode()
    try:
        while rest:
            rest = rest[os.write(file, rest) :]
        if sync:
            os.fsync(file)
    except OSError:
        os.ftruncate(file, before)
        raise
