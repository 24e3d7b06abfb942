"""`Config`: everything one run is made of, as one frozen tree."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from .._core.errors import ConfigError, Problem, format_problems
from ..data import BYTES, DataConfig
from ..hardware import Chip
from ..lm import DecoderConfig, TextTrainConfig, declare_run
from ..mesh import MeshSpec
from ..parallel import Strategy, strategies
from ._compile import CompileConfig
from ._optimizer import OptimizerConfig

if TYPE_CHECKING:
    from ..step import StepSpec


def _default_model() -> DecoderConfig:
    return DecoderConfig(vocab=BYTES, embed_dim=128, num_layers=4, num_heads=4, mlp_dim=384)


def _default_optimizer() -> OptimizerConfig:
    return OptimizerConfig(name="muon")


def _default_strategy() -> Strategy:
    return strategies.data() | strategies.tensor()


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. `Config()` is the default one: the standard library on eight simulated devices.

    Attributes:
      name: of the run; its files go to `runs/<name>`.
      model: the decoder.
      data: the text.
      devices: target on which the mesh is built: `local`, `cpu:8`, ….
      mesh: axes and their sizes.
      strategy: what is laid out on which axis.
      optimizer: the update.
      train: the loop, how the result is scored, and what is written.
      compile: how the step is compiled.
      hardware: chips beside those of the hardware table, which plans and reports may name.
    """

    name: str = "default"
    model: DecoderConfig = dataclasses.field(default_factory=_default_model)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    devices: str = "cpu:8"
    mesh: MeshSpec = dataclasses.field(default_factory=lambda: MeshSpec(data=-1, tensor=4))
    strategy: Strategy = dataclasses.field(default_factory=_default_strategy)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=_default_optimizer)
    train: TextTrainConfig = dataclasses.field(default_factory=TextTrainConfig)
    compile: CompileConfig = dataclasses.field(default_factory=CompileConfig)
    hardware: tuple[Chip, ...] = ()

    def step_spec(self) -> "StepSpec":
        """The training step of the run; `mesh` and `devices` say what it is compiled for."""
        optimizer = self.optimizer.build(self.train.steps)
        compiling = self.compile.arguments
        return declare_run(self.model, self.data, self.strategy, optimizer, **compiling)

    def __post_init__(self) -> None:
        """Refuses a model that has no token for some byte, and a name that is no folder's."""
        if isinstance(self.name, str) and Path(self.name).name != (self.name or "."):
            why = "names a folder below runs/, so it is one word without slashes"
            problem = Problem(f"name={self.name!r}", why, "--set name=first, or train.out=FOLDER")
            raise ConfigError(format_problems("The run has no usable name.", [problem]))
        by_byte = (
            isinstance(self.data, DataConfig) and self.data.path is self.data.tokenizer is None
        )
        if by_byte and isinstance(self.model, DecoderConfig) and self.model.vocab < BYTES:
            why = f"text is read by the byte, which takes {BYTES} tokens."
            fix = f"--set model.vocab={BYTES}"
            problem = Problem(f"model.vocab={self.model.vocab}", why, fix)
            raise ConfigError(format_problems("The parts do not fit together.", [problem]))
