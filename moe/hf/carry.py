"""What travels with a transformers model beside its weights: its tokenizer's files, and its own config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..domains import DomainRegistry
from .config import shape_json
from .formats import HFFormat
from .read import model_config

CONFIG = "config.json"
CARRIED = "transformers"  # the folder of a checkpoint of ours that keeps the files of the model it was made from
# Tokenizer, templates and generation settings, and the terms under which the weights may be passed on.
_TOKENIZER = (
    "tokenizer.json tokenizer.model tokenizer_config.json tekken.json vocab.json vocab.txt merges.txt "
    "special_tokens_map.json added_tokens.json chat_template* additional_chat_templates/*.jinja"
).split()
_OTHERS = ("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
_COEFFICIENT = "router_aux_loss_coef"  # ours times top_k: the way back may differ in the last bit
# One key by two names: as transformers' versions and classes call it.
_ALIASES = {"num_local_experts": "num_experts", "num_experts": "num_local_experts", "dtype": "torch_dtype"}


def carried_files(folder: Path) -> dict[str, Path]:
    """Return the files of `folder` that are copied byte for byte, by their relative names, in order."""
    found = {path for pattern in (*_TOKENIZER, *_OTHERS) for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def has_tokenizer(folder: Path) -> bool:
    """Whether some file of a tokenizer lies in `folder`."""
    return any(path.is_file() for pattern in _TOKENIZER for path in folder.glob(pattern))


def carried_config(
    parent: Mapping[str, Any],
    format: HFFormat,
    config: ModelConfig,
    registry: DomainRegistry,
    *,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Return config.json of a model of `format`, made from one whose config.json is `parent`.

    It is `parent` but for the keys that say what `config` and `registry` changed, and `dtype`, where one is given
    ("bfloat16"): what sigmoe knows nothing of stays. Raises ValueError where `parent` is of another format.
    """
    known, before = model_config(parent)
    if known != format:
        raise ValueError(f"config.json of a {known} says little of a {format}")
    then = shape_json(format, before, before.build_registry(("any",)))
    now = shape_json(format, config, registry)
    changes = {key: value for key, value in now.items() if then[key] != value}
    if dtype is not None:
        changes["dtype"] = dtype
    result = dict(parent)
    for key, value in changes.items():
        names = [name for name in (key, _ALIASES.get(key, key)) if name in parent]
        result |= dict.fromkeys(names or [key], value)
    _, after = model_config(result)
    said = shape_json(format, after, after.build_registry(("any",)))
    assert {key for key in now if said[key] != now[key]} <= {_COEFFICIENT}, changes
    return result
