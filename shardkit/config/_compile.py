"""How the step of a run is compiled."""

import dataclasses
from typing import Any, Literal

from .._core.errors import ConfigError, Problem, raise_all
from .._core.options import check_options
from ._values import BadValue, parse


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """What goes to the compiler beside the program.

    Attributes:
      mode: `"auto"`, where the partitioner places the collectives, or `"shard_map"`, where they
        are explicit.
      options: XLA options, each `name=value`; a name that the target's compiler does not know is
        an error of its own.
      on_nonfinite: what is done with an update whose loss or gradients are not finite: `stop`
        there and keep what it failed on, `skip` and count it, or `apply` it all the same.
      deterministic: leave the compiler no operation whose result varies from run to run.
      debug: find random keys that are used twice.

    >>> CompileConfig(options=("xla_first=true", "xla_second=2")).arguments["compiler_options"]
    {'xla_first': True, 'xla_second': 2}
    """

    mode: str = "auto"
    options: tuple[str, ...] = ()
    on_nonfinite: Literal["apply", "skip", "stop"] = "stop"
    deterministic: bool = False
    debug: bool = False

    def __post_init__(self) -> None:
        """Refuses an option without a name or a value."""
        check_options(self, ConfigError, "The step cannot be compiled this way.", "compile.")
        problems = [
            Problem(f"compile.options={one!r}", "is not name=value", "xla_some_option=true")
            for one in self.options
            if not all(part.strip() for part in one.partition("=")[::2])
        ]
        raise_all(ConfigError, "The compiler's options cannot be read.", problems)

    @property
    def arguments(self) -> dict[str, Any]:
        """Fields of the `StepSpec`."""
        pairs = (one.partition("=") for one in self.options)
        options = {name.strip(): _typed(value.strip()) for name, _, value in pairs}
        rest = ("mode", "on_nonfinite", "deterministic", "debug")
        return {**{name: getattr(self, name) for name in rest}, "compiler_options": options}


def _typed(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return parse(kind, text)
        except BadValue:
            continue
    return text
