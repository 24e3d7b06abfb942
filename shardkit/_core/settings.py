"""JAX's settings in this process."""

from typing import Any

import jax

SETTINGS: Any = jax.config  # whose stubs do not list every setting
