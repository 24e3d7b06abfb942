"""`Tuning`: a run that starts from weights, trains adapters, and writes its result like them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from .._core.errors import CheckpointError, Problem, raise_all
from .._core.io._files import local_path
from .._core.types import Key, Params
from ..peft import LoraModel, QuantizedModel, name_modules
from ..run.callbacks import Callback, RunContext
from ..step import CompiledStep, StepSpec
from ._config import TextTrainConfig
from ._declare import decoder_model
from ._decoder_config import DecoderConfig
from ._lora import LoraConfig


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights in files, of whatever form the functions read and write."""

    folder: str  # with the files, for messages
    fingerprint: str  # of the files; a run resumes only with the same
    # `(spec, mesh, key) -> params` in the layout of a step; the key draws adapters, and is None
    # where there are none
    load: Callable[[StepSpec, Mesh, Key | None], Params]
    # `(path, params)`, which writes the parameters of the decoder like the files
    save: Callable[[str, Params], None]
    # `(path of a weight, index of its layer) -> name` of its module in the files
    module_name: Callable[[str, tuple[int, ...]], str]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What a run trains, where it starts, and what it leaves."""

    model: DecoderConfig  # the decoder
    lora: LoraConfig | None  # its adapters; None, or no rank: there are none
    pretrained: Pretrained | None  # weights that it starts from; None: drawn ones
    loop: TextTrainConfig  # with the folders of exports

    @functools.cached_property
    def adapted(self) -> LoraModel | None:
        """The decoder with adapters; None without."""
        has_rank = self.lora is not None and self.lora.rank is not None
        return self.lora.adapt(decoder_model(self.model)) if self.lora and has_rank else None

    @functools.cached_property
    def quantized(self) -> QuantizedModel | None:
        """The same with codes for frozen weights; None without."""
        return self.lora.quantize_base(self.adapted) if self.lora and self.adapted else None

    def merge(self, params: Params) -> Params:
        """Returns the parameters of the decoder itself; codes become floats."""
        params = self.dequantize(params)
        return params if self.adapted is None else self.adapted.merge(params)

    def dequantize(self, params: Params) -> Params:
        """Returns the parameters with floats in place of codes."""
        return params if self.quantized is None else self.quantized.dequantize(params)

    def check(self) -> None:
        """Refuses exports that cannot be written, before a run starts.

        Raises:
          CheckpointError: names every folder that exists already, and what is missing for it.
        """
        problems = []
        for name, path in self._exports.items():
            subject = f"train.{name}={path}"
            if local_path(path, CheckpointError).exists():
                problems.append(Problem(subject, "exists already", "another folder"))
            if self.pretrained is None:
                why = "is written like model.weights, which the run does not have"
                problems.append(Problem(subject, why, "a config with model.weights=HF_DIR"))
            if name == "export_adapter" and self.adapted is None:
                why = "has nothing to write: no adapters are trained"
                problems.append(Problem(subject, why, "--set lora.rank=8"))
        headline = "The result cannot be exported."
        raise_all(CheckpointError, headline, problems)
        if self.loop.export_adapter and self.adapted and self.pretrained:
            name_modules(self.adapted.adapted, self.pretrained.module_name, headline)

    @property
    def _exports(self) -> dict[str, str]:
        paths = {"export": self.loop.export, "export_adapter": self.loop.export_adapter}
        return {name: path for name, path in paths.items() if path is not None}

    def loader(self, spec: StepSpec, mesh: Mesh) -> Callable[[CompiledStep], Params] | None:
        """Returns what reads the first parameters; None if they are drawn."""
        pretrained = self.pretrained
        if pretrained is None:
            return None
        key = None if self.adapted is None else jax.random.key(self.loop.seed)
        codes, adapted = self.quantized, self.adapted
        if codes is None or adapted is None:
            return lambda step: pretrained.load(spec, mesh, key)
        # Each device reads floats where it is to hold codes.
        floats = spec.replace(init=adapted.init, loss_fn=adapted.loss_fn)
        return lambda step: codes.quantize(pretrained.load(floats, mesh, key))

    def callbacks(self) -> list[Callback]:
        """Returns what writes the exports."""
        return [Export(self)] if self._exports else []

    def export(self, params: Params) -> list[str]:
        """Writes the exports; returns a line about each."""
        assert self.pretrained is not None, "checked before the run"
        lines, paths = [], self._exports
        if "export" in paths:
            self.pretrained.save(paths["export"], self.merge(params))
            lines.append(f"weights like {self.pretrained.folder}: {paths['export']}")
        if "export_adapter" in paths:
            assert self.adapted is not None, "checked before the run"
            self.adapted.save(
                paths["export_adapter"],
                self.dequantize(params),
                names=self.pretrained.module_name,
                base_model=self.pretrained.folder,
                task_type="CAUSAL_LM",
            )
            lines.append(f"adapters: {paths['export_adapter']}")
        return lines


class Export(Callback):
    """Writes the exports of a run at its end, before anything else is done with the result."""

    def __init__(self, tuning: Tuning) -> None:
        """Declares what is written."""
        self._tuning = tuning

    def on_start(self, run: RunContext, state: Any) -> None:
        self._run = run

    def on_finish(self, state: Any) -> None:
        """Writes them, and says where."""
        for line in self._tuning.export(state.params):
            self._run.say(line)
