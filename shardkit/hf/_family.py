"""`ModelFamily`: what distinguishes one kind of Hugging Face model, as data."""

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

from ..rules import matches
from ._table import Table
from ._tensor_files import StoredTensor, equal

Reader = Callable[[dict[str, Any]], Mapping[str, Any]]
"""Takes its keys out of the values of `config.json`; returns fields of `DecoderConfig`."""


@dataclasses.dataclass(frozen=True)
class ModelFamily:
    """One kind of model: its configuration and its tensors, in the terms of the decoder.

    Every key of a `config.json` must be in `fields`, `fixed`, `ignored` or read by a reader, so
    that nothing that changes the numbers is passed over.

    Attributes:
      model_type: of `config.json`.
      architecture: of `config.json`.
      fields: `{key: field of DecoderConfig}`.
      tensors: `{leaf: (tensors, pattern)}` of every leaf that a model of the family may have.
      defaults: values of keys that a file may omit.
      fixed: `{key: the values that the decoder computes}`.
      constants: fields of `DecoderConfig` that are the same in the whole family.
      aliases: `{other name of a key: key}`.
      readers: functions that read what is spread over several keys.
      ignored: globs of keys that change no number, beside those of every family.
      prefix: start of the tensors' names, which some files omit.
      ignored_tensors: globs of tensors that are no parameters.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, str]
    tensors: Table
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    readers: tuple[Reader, ...] = ()
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    ignored_tensors: tuple[str, ...] = ("*.rotary_emb.inv_freq",)

    def named_like(self, names: Iterable[str]) -> Table:
        """Returns the table, without the prefix if no name in a file has it."""
        names = tuple(names)
        if not self.prefix or not names or any(name.startswith(self.prefix) for name in names):
            return self.tensors
        short = {leaf: (n.removeprefix(self.prefix), p) for leaf, (n, p) in self.tensors.items()}
        return short

    def parameters(
        self, tensors: Mapping[str, StoredTensor], leaves: Container[str]
    ) -> dict[str, StoredTensor]:
        """Returns the tensors that are parameters of a model with these leaves.

        Others are `ignored_tensors`, and a head that repeats the embedding it is tied to.
        """
        table = self.named_like(tensors)
        embedding, head = (table[leaf][0] for leaf in ("embedding", "head"))
        pair = [tensors[name] for name in (embedding, head) if name in tensors]
        repeated = {head} if "head" not in leaves and len(pair) == 2 and equal(*pair) else ()
        return {
            name: tensor
            for name, tensor in tensors.items()
            if name not in repeated and not any(matches(g, name) for g in self.ignored_tensors)
        }

    def module_name(self, leaf: str) -> str | None:
        """Returns the name of the module that holds a leaf, with `{i}` for the layer.

        Adapters name the weights that they adapt in this way. None: it also holds other leaves.

        >>> from shardkit.hf import FAMILIES
        >>> FAMILIES["llama"].module_name("layers/query")
        'model.layers.{i}.self_attn.q_proj'
        """
        tensor, _ = self.tensors[leaf]
        shared = [name for name, _ in self.tensors.values()].count(tensor) > 1
        return None if shared else tensor.rpartition(".")[0]
