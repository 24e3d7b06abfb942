"""`PretrainedDecoder`: the decoder of a Hugging Face folder as the model of a config."""

import dataclasses
import functools
from pathlib import Path

from jax.sharding import Mesh

from .. import hf
from .._core.errors import CheckpointError, ConfigError, DataError, raise_all
from .._core.io._files import path_problem
from .._core.options import check_options
from .._core.types import Key, Params
from ..data import DataConfig
from ..hf._fingerprint import stored_dtype
from ..lm import DecoderConfig, LoraConfig, Pretrained
from ..step import StepSpec

_TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class PretrainedDecoder:
    """A decoder whose sizes, options and weights are those of a Hugging Face folder.

    Attributes:
      weights: the folder, with `config.json` and safetensors files.
      attention: as in `DecoderConfig`; these others too.
      dropout: of each branch's output, in training.
      loss_chunks: parts of the vocabulary whose logits are in memory one after another.
      vocab_padding: rows added to the tables so that a mesh axis divides them.
      balance_loss: weight of each block's load-balancing loss, with experts.
      ignore: keys of `config.json` that are known to change no number.
    """

    weights: str | None = None
    attention: str = "auto"
    dropout: float = 0.0
    loss_chunks: int = 1
    vocab_padding: int = 0
    balance_loss: float = 0.0
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        headline = "The model cannot be read."
        check_options(self, ConfigError, headline, "model.")
        problem = self.weights and path_problem(self.weights, f"model.weights={self.weights}")
        raise_all(ConfigError, headline, [problem] if problem else [])

    @property
    def folder(self) -> Path:
        """The folder.

        Raises:
          ConfigError: it is not set, or absent.
        """
        why = "is not set" if self.weights is None else "is not a folder"
        folder = Path(self.weights or "").expanduser()
        if self.weights is None or not folder.is_dir():
            fix = "--set model.weights=HF_DIR, a folder that save_pretrained made"
            subject = "model.weights" if self.weights is None else f"model.weights={self.weights}"
            raise ConfigError.of("There are no weights to start from.", subject, why, fix)
        return folder

    @functools.cached_property
    def decoder(self) -> DecoderConfig:
        """The decoder that the folder describes.

        Raises:
          ConfigError: the folder is absent, or its family is unknown.
          CheckpointError: it has no `config.json`.
        """
        changes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del changes["weights"], changes["ignore"]
        return hf.decoder_config(self.folder, ignore=self.ignore, **changes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the files; see `sk.hf.fingerprint`."""
        return hf.fingerprint(self.folder)

    def lora(self, declared: LoraConfig) -> LoraConfig:
        """Adapters with the dtype of the frozen weights, by default that of the files."""
        if declared.rank is None or declared.base_dtype is not None:
            return declared
        half = stored_dtype(self.folder) == "bfloat16"
        return dataclasses.replace(declared, base_dtype="bfloat16" if half else "float32")

    def data(self, declared: DataConfig) -> DataConfig:
        """Data that the folder's tokenizer encodes, unless another one is declared.

        Raises:
          DataError: the folder has no tokenizer.
        """
        if declared.tokenizer is not None:
            return declared
        path = self.folder / _TOKENIZER
        if not path.is_file():
            fix = "--set data.tokenizer=FILE.json, or --set data.tokenizer=bytes"
            why = f"has no {_TOKENIZER}"
            raise DataError.of("The text cannot be encoded.", str(self.folder), why, fix)
        return dataclasses.replace(declared, tokenizer=str(path))

    def open(self) -> Pretrained:
        """Returns how a run reads and writes the weights.

        Raises:
          CheckpointError: the files cannot be read.
        """
        folder, padding = self.folder, self.vocab_padding

        def load(spec: StepSpec, mesh: Mesh, key: Key | None) -> Params:
            return hf.load(folder, spec, mesh, vocab_padding=padding, key=key)

        def save(path: str, params: Params) -> None:
            hf.save(path, params, like=folder, vocab_padding=padding)

        def module_name(path: str, index: tuple[int, ...]) -> str:
            name = hf.find_family(folder).module_name(path)
            if name is None:
                why = "is a part of a module, whose parts PEFT adapts together"
                fix = "--set train.export=DIR, weights with the adapters merged; or other "
                headline = "Adapters cannot be exported."
                raise CheckpointError.of(headline, path, why, f"{fix}lora.targets")
            return name.format(**dict(zip("ij", index, strict=False)))

        return Pretrained(str(folder), self.fingerprint, load, save, module_name)
