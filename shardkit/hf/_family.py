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
    """

    model_type: str  # of `config.json`
    architecture: str  # of `config.json`
    fields: Mapping[str, str]  # `{key: field of DecoderConfig}`
    tensors: Table  # `{leaf: (tensors, pattern)}` of every leaf that a model of the family may have
    # values of keys that a file may omit
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # `{key: the values that the decoder computes}`
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    # fields of `DecoderConfig` that are the same in the whole family
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # `{other name of a key: key}`
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    readers: tuple[Reader, ...] = ()  # functions that read what is spread over several keys
    # globs of keys that change no number, beside those of every family
    ignored: tuple[str, ...] = ()
    prefix: str = ""  # start of the tensors' names, which some files omit
    # globs of tensors that are no parameters
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
