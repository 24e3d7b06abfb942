"""`config.json` of a Hugging Face folder as a `DecoderConfig`."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._core.errors import CheckpointError, ConfigError, Problem, did_you_mean, raise_all
from .._core.io._files import local_path
from ..lm import DecoderConfig
from ..rules import matches
from ._family import ModelFamily
from ._readers import Unread
from ._tensor_files import load_json
from .families import FAMILIES

CONFIG = "config.json"
_HEADLINE = "config.json does not describe a decoder that shardkit computes."

_MOST = 10_000  # layers, or experts of a layer

# Keys of every family that change no number of a forward pass or of its gradient.
_IGNORED = (
    *("_name_or_path", "_attn_implementation*", "architectures", "attn_implementation"),
    *("*token_id", "dtype", "torch_dtype", "initializer_range", "is_decoder", "model_type"),
    *("max_position_embeddings", "pretraining_tp", "transformers_version", "use_cache"),
    *("output_attentions", "output_hidden_states", "return_dict", "task_specific_params"),
    *("router_aux_loss_coef", "cache_implementation", "id2label", "label2id"),
    *("_num_labels", "tokenizer_class", "transformers.js_config", "unsloth_*"),
)


def decoder_config(
    path: str | os.PathLike[str], *, ignore: Sequence[str] = (), **changes: Any
) -> DecoderConfig:
    """Reads the decoder that a folder's `config.json` describes.

    Losses of routers are 0, as in `transformers` unless they are asked for; dropout is 0.

    Args:
      path: the folder.
      ignore: globs of further keys that are known to change no number.
      **changes: fields of `DecoderConfig` to set: `attention`, `loss_chunks`, `vocab_padding`, ….

    Raises:
      ConfigError: the family is unknown; or with every key that is unknown, missing, or has a
        value that the decoder does not compute.
      CheckpointError: the file is absent, or not JSON.
    """
    folder = local_path(path, ConfigError, _HEADLINE)
    family, values = find_family(folder), dict(load_json(folder / CONFIG))
    fields: dict[str, Any] = {**family.constants}
    renamed = {family.aliases.get(key, key): value for key, value in values.items()}
    values = {**family.defaults, **renamed}
    problems = _count_problems(family, values)
    raise_all(ConfigError, _HEADLINE, problems)
    for read in family.readers:
        try:
            fields |= read(values)
        except Unread as error:
            problems.append(Problem(error.key, str(error)))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            why = f"has a value of another type: {type(error).__name__}: {error}"
            problems.append(Problem(CONFIG, why))
    for key, field in family.fields.items():
        if key not in values:
            problems.append(Problem(key, f"is missing: {field} of the decoder"))
        fields[field] = values.pop(key, None)
    for key, allowed in family.fixed.items():
        value = values.pop(key, allowed[0])
        if value not in allowed:
            computed = " or ".join(map(repr, allowed))
            problems.append(Problem(f"{key}={value!r}", f"is not computed; {computed} is"))
    ignored = (*_IGNORED, *family.ignored, *ignore)
    unknown = [key for key in values if not any(matches(glob, key) for glob in ignored)]
    known = (*family.fields, *family.fixed, *family.defaults)
    problems += [
        Problem(
            f"{key}={values[key]!r}",
            f"is not a key of {family.model_type} that shardkit knows.{did_you_mean(key, known)}",
            f"if it changes no number sk.hf.decoder_config(folder, ignore=[{key!r}]), "
            f"--set model.ignore={key} of a run, or shardkit convert ... --ignore {key}",
        )
        for key in unknown
    ]
    fix = "another checkpoint; shardkit computes only what it can prove equal"
    raise_all(ConfigError, _HEADLINE, problems, fix)
    return dataclasses.replace(DecoderConfig(**fields), **changes)


def _count_problems(family: ModelFamily, values: Mapping[str, Any]) -> list[Problem]:
    """Counts that no folder can have, before anything is made for each layer or expert."""
    keys = [key for key, field in family.fields.items() if field in ("num_layers", "experts")]
    return [
        Problem(
            f"{key}={values[key]}",
            f"is more than {_MOST:,}, which no model has",
            "config.json as save_pretrained wrote it",
        )
        for key in keys
        if isinstance(values.get(key), int) and values[key] > _MOST
    ]


def find_family(folder: Path) -> ModelFamily:
    """Returns the family that `config.json` names.

    Raises:
      ConfigError: it is unknown, or the architecture is not that of the model type.
      CheckpointError: the file is absent, or not JSON.
    """
    if not (folder / CONFIG).is_file():
        fix = "a folder that save_pretrained made"
        raise CheckpointError.of("The family is unknown.", str(folder), f"has no {CONFIG}", fix)
    values = load_json(folder / CONFIG)
    model_type, family = values.get("model_type"), _lookup(values)
    known = f"known: {', '.join(FAMILIES)}"
    fix = "table={...}, which maps the tensors of any model onto yours"
    if family is None:
        why = f"is not a known family; {known}.{did_you_mean(str(model_type), FAMILIES)}"
        raise ConfigError.of(_HEADLINE, f"model_type={model_type!r}", why, fix)
    architectures = values.get("architectures") or [family.architecture]
    if not isinstance(architectures, list) or family.architecture not in architectures:
        why = f"is not a language model of {model_type}: {family.architecture}"
        raise ConfigError.of(_HEADLINE, f"architectures={architectures}", why, fix)
    return family


def _lookup(values: Mapping[str, Any]) -> ModelFamily | None:
    model_type = values.get("model_type")
    return FAMILIES.get(model_type) if isinstance(model_type, str) else None
