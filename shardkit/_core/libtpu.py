"""The TPU's library where there is no TPU."""

import glob
from collections.abc import Mapping

# What libtpu asks the cloud for. Nobody answers off the cloud, of which it complains at length
# whenever JAX looks for devices; with these it finds no TPU without a word. A topology that is
# compiled for is named by whoever compiles, so these do not matter to it.
_ANSWERS = {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}


def quiet_libtpu(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns variables that keep libtpu quiet in a process with this environment.

    They count before libtpu is loaded, which JAX does when it looks for devices.

    Returns:
      Nothing where a TPU may be present, or somebody else has answered.
    """
    if any(name in environment for name in _ANSWERS) or glob.glob("/dev/accel*"):
        return {}
    return {} if glob.glob("/dev/vfio/[0-9]*") else dict(_ANSWERS)
