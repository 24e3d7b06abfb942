"""`Config`: all settings of one run, as one frozen tree."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from .._core.errors import ConfigError, Problem, format_problems
from ..data import BYTES, DataConfig
from ..hardware import Chip
from ..lm import DecoderConfig, LoraConfig, TextTrainConfig, declare_run
from ..mesh import MeshSpec
from ..parallel import Strategy, strategies
from ._compile import CompileConfig
from ._optimizer import OptimizerConfig
from ._pretrained import PretrainedDecoder

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
      model: the decoder; a `PretrainedDecoder` is that of a Hugging Face folder.
      lora: adapters, which alone are trained.
      data: the text.
      devices: target that the mesh is built on: `local`, `cpu:8`, ….
      mesh: axes and their sizes.
      strategy: what is sharded over which axis.
      optimizer: how parameters are updated.
      train: the loop, the scores at its end, and the files of the run.
      compile: how the step is compiled.
      hardware: further chips for plans and reports, besides those of the hardware table.
    """

    name: str = "default"
    model: DecoderConfig | PretrainedDecoder = dataclasses.field(default_factory=_default_model)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    devices: str = "cpu:8"
    mesh: MeshSpec = dataclasses.field(default_factory=lambda: MeshSpec(data=-1, tensor=4))
    strategy: Strategy = dataclasses.field(default_factory=_default_strategy)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=_default_optimizer)
    train: TextTrainConfig = dataclasses.field(default_factory=TextTrainConfig)
    compile: CompileConfig = dataclasses.field(default_factory=CompileConfig)
    hardware: tuple[Chip, ...] = ()

    def step_spec(self) -> "StepSpec":
        """Returns the training step; `mesh` and `devices` are what to compile it for."""
        optimizer = self.optimizer.build(self.train.steps)
        options = {"lora": self.adapters, **self.compile.arguments}
        return declare_run(self.decoder, self.data, self.strategy, optimizer, **options)

    @property
    def decoder(self) -> DecoderConfig:
        """The decoder, read from `config.json` if `model` is that of a folder.

        Raises:
          ConfigError: the folder is absent, or its family is unknown.
          CheckpointError: it has no `config.json`.
        """
        return self.model if isinstance(self.model, DecoderConfig) else self.model.decoder

    @property
    def adapters(self) -> LoraConfig:
        """The adapters, with the dtype of the weights beside them."""
        model = self.model
        return model.lora(self.lora) if isinstance(model, PretrainedDecoder) else self.lora

    @property
    def encoded_data(self) -> DataConfig:
        """The data, with the tokenizer of the folder of weights where it names none."""
        model = self.model
        return model.data(self.data) if isinstance(model, PretrainedDecoder) else self.data

    def __post_init__(self) -> None:
        """Refuses a vocabulary smaller than the bytes of text, and a name with slashes."""
        if isinstance(self.name, str) and Path(self.name).name != (self.name or "."):
            why = "names a folder below runs/, so it cannot have slashes"
            problem = Problem(f"name={self.name!r}", why, "--set name=first, or train.out=FOLDER")
            raise ConfigError(format_problems("The name of the run is not usable.", [problem]))
        by_byte = (
            isinstance(self.data, DataConfig) and self.data.path is self.data.tokenizer is None
        )
        if by_byte and isinstance(self.model, DecoderConfig) and self.model.vocab < BYTES:
            why = f"text is read by the byte, which takes {BYTES} tokens."
            fix = f"--set model.vocab={BYTES}"
            problem = Problem(f"model.vocab={self.model.vocab}", why, fix)
            raise ConfigError(format_problems("The parts do not fit together.", [problem]))
