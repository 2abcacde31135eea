"""All files of a transformers model but its weights: the one place that writes them."""

from collections.abc import Mapping
from typing import Any

import torch

from ..config import ModelConfig
from ..data.tokenizer import END_OF_TEXT, PADDING, parse_tokenizer, special_id
from ..domains import DomainRegistry
from ..storage.checkpoint import encode_json
from ..storage.durable import DurableDirectory
from ..stored import StoredModel, read_json
from .carry import CARRIED, CONFIG, carried_config, carried_files, has_tokenizer
from .config import config_json, generation_config, tokenizer_config
from .formats import HFFormat

_WITHOUT_LENGTH = 2048  # positions that a model claims whose maker told none
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_hf_files(
    directory: DurableDirectory,
    parent: StoredModel,
    config: ModelConfig,
    registry: DomainRegistry,
    format: HFFormat,
    *,
    dtype: torch.dtype,
    rounded: bool = False,
) -> None:
    """Write config.json, tokenizer and generation settings of a model of `format` that was made from `parent`.

    They are the parent's own, where it is, or was made from, a model of transformers': of config.json only what changed
    is replaced (`dtype` where the parameters were `rounded` to it). Else they are made from the checkpoint's tokenizer;
    ValueError where it has none.
    """
    files = {} if parent.hf_folder is None else carried_files(parent.hf_folder)
    directory.write(CONFIG, _config(parent, config, registry, format, dtype, rounded))
    for relative, path in files.items():
        directory.write(relative, path.read_bytes())
    if parent.tokenizer is not None and (parent.hf_folder is None or not has_tokenizer(parent.hf_folder)):
        _write_tokenizer(directory, parent, parent.tokenizer)


def write_carried(directory: DurableDirectory, parent: StoredModel) -> None:
    """Copy the transformers files of `parent`, where it has any, into the folder where a checkpoint keeps them."""
    if parent.hf_folder is not None:
        for name, path in {CONFIG: parent.hf_folder / CONFIG, **carried_files(parent.hf_folder)}.items():
            directory.write(f"{CARRIED}/{name}", path.read_bytes())


def _config(
    parent: StoredModel,
    config: ModelConfig,
    registry: DomainRegistry,
    format: HFFormat,
    dtype: torch.dtype,
    rounded: bool,
) -> bytes:
    name = str(dtype).removeprefix("torch.")
    told = {} if parent.hf_folder is None else read_json(parent.hf_folder / CONFIG)
    if parent.hf_folder is not None and told.get("model_type") == format:
        data = carried_config(told, format, config, registry, dtype=name if rounded else None)
        return (parent.hf_folder / CONFIG).read_bytes() if data == told else encode_json(data)
    data = config_json(format, config, registry, dtype=name, **_sizes(parent, told))
    return encode_json(data | {key: told.get(key) for key in _TOKENS if told})


def _sizes(parent: StoredModel, told: Mapping[str, Any]) -> dict[str, int]:
    """What config.json says of sequences and tokens; ids stand in where the parent's own are taken."""
    special = {"end_of_text": 0, "padding": 0} if told else _special(parent)
    return {"sequence_length": parent.sequence_length or _WITHOUT_LENGTH, **special}


def _special(parent: StoredModel) -> dict[str, int]:
    if parent.tokenizer is None:
        raise ValueError(f"{parent.path} has no tokenizer.json, which transformers wants: give format=sigmoe")
    tokenizer = parse_tokenizer(parent.tokenizer, f"{parent.path}/tokenizer.json")
    return {"end_of_text": special_id(tokenizer, END_OF_TEXT), "padding": special_id(tokenizer, PADDING)}


def _write_tokenizer(directory: DurableDirectory, parent: StoredModel, tokenizer: bytes) -> None:
    directory.write("tokenizer.json", tokenizer)
    directory.write("tokenizer_config.json", encode_json(tokenizer_config(parent.sequence_length or _WITHOUT_LENGTH)))
    if "generation_config.json" not in directory.records:
        directory.write("generation_config.json", encode_json(generation_config(**_special(parent))))
