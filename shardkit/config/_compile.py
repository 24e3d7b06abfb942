"""`CompileConfig`: how the step of a run is compiled."""

import dataclasses
from typing import Any, Literal

from .._core.errors import ConfigError, Problem, raise_all
from .._core.io._files import path_problem
from .._core.options import check_options
from ._values import BadValue, parse


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """Fields of `StepSpec` that do not depend on the model.

    Attributes:
      mode: `"auto"`: the partitioner places the collectives; `"shard_map"`: they are explicit.
      options: XLA options, each `name=value`; the compiler refuses names that it does not know.
      on_nonfinite: if the loss or a gradient is not finite: `stop` the run and dump the step,
        `skip` the update and count it, or `apply` it.
      deterministic: exclude operations whose result varies from run to run.
      debug: detect random keys that are used twice.
      cache: folder of `shardkit train` for what it compiles, which is loaded when the run is
        started again; `auto`: `.compiled` beside the folder of the run, but none for several
        simulated CPU devices; `off`: none.

    >>> CompileConfig(options=("xla_first=true", "xla_second=2")).arguments["compiler_options"]
    {'xla_first': True, 'xla_second': 2}
    """

    mode: str = "auto"
    options: tuple[str, ...] = ()
    on_nonfinite: Literal["apply", "skip", "stop"] = "stop"
    deterministic: bool = False
    debug: bool = False
    cache: str = "auto"

    def __post_init__(self) -> None:
        """Refuses an option without a name or a value."""
        check_options(self, ConfigError, "The step cannot be compiled this way.", "compile.")
        problems = [
            Problem(f"compile.options={option!r}", "is not name=value", "xla_some_option=true")
            for option in self.options
            if not all(part.strip() for part in option.partition("=")[::2])
        ]
        raise_all(ConfigError, "The compiler's options cannot be read.", problems)
        problem = path_problem(self.cache, f"compile.cache={self.cache}")
        raise_all(ConfigError, "What is compiled cannot be kept.", [problem] if problem else [])

    @property
    def arguments(self) -> dict[str, Any]:
        """The fields as keyword arguments of `StepSpec`."""
        pairs = (option.partition("=") for option in self.options)
        options = {name.strip(): _parse_option(value.strip()) for name, _, value in pairs}
        names = ("mode", "on_nonfinite", "deterministic", "debug")
        return {**{name: getattr(self, name) for name in names}, "compiler_options": options}


def _parse_option(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return parse(kind, text)
        except BadValue:
            continue
    return text
