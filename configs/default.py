"""The default run, as a file to copy and change.

    shardkit train configs/default.py

is the same as `shardkit train`: a byte-level decoder of 0.9 M parameters learns the Python
standard library's source on 8 simulated CPU devices, mesh data=2 x tensor=4. Expect about three
minutes on 2 cores, and fewer bits per validation byte than gzip -9 needs.
"""

from shardkit.config import Config


def config() -> Config:
    """Returns the default config."""
    return Config()
