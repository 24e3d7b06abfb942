"""How the step of a run is compiled."""

import dataclasses

from .._errors import ConfigError, Problem, raise_all
from ._values import BadValue, parse


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """What goes to the compiler beside the program.

    Attributes:
      mode: `"auto"`, where the partitioner places the collectives, or `"shard_map"`, where they
        are explicit.
      options: XLA options, each `name=value`; a name that the target's compiler does not know is
        an error of its own.

    >>> CompileConfig(options=("xla_embed_ir_in_executable=true", "xla_count=2")).by_name
    {'xla_embed_ir_in_executable': True, 'xla_count': 2}
    """

    mode: str = "auto"
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuses an option without a name or a value."""
        problems = [
            Problem(f"compile.options={one!r}", "is not name=value", "xla_some_option=true")
            for one in self.options
            if not all(part.strip() for part in one.partition("=")[::2])
        ]
        raise_all(ConfigError, "The compiler's options cannot be read.", problems)

    @property
    def by_name(self) -> dict[str, bool | int | float | str]:
        """The options as `compile_step(compiler_options=...)` takes them."""
        pairs = (one.partition("=") for one in self.options)
        return {name.strip(): _typed(value.strip()) for name, _, value in pairs}


def _typed(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return parse(kind, text)
        except BadValue:
            continue
    return text
