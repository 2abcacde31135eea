"""Models as they lie on disk, in whatever format: opened without reading a weight, loaded whole when asked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..kernels.backend import TORCH, Backends
from .canonical import canonical_tensors, expected_shapes
from .config import ModelConfig
from .domains import DomainRegistry
from .hf.carry import CARRIED, CONFIG
from .hf.names import hf_name
from .hf.read import model_config
from .model import Transformer
from .parsing import from_mapping
from .storage.checkpoint import MANIFEST, Checkpoint, open_checkpoint
from .storage.tensor_format import load_json
from .storage.tensor_reader import TensorReader

EXTRACTION = "extraction.json"
CONVERSION = "conversion.json"
PRUNING = "report.json"
ANY_DOMAIN = "any"  # the only domain of a model whose maker gave it none


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A model on disk. `tensors` has canonical names; `tokenizer` is the content of tokenizer.json."""

    path: Path
    format: str  # sigmoe, or one of transformers' model types
    config: ModelConfig
    registry: DomainRegistry
    tensors: TensorReader
    tokenizer: bytes | None
    sequence_length: int | None  # what it was trained on, in tokens
    step: int | None  # of its training
    hf_folder: Path | None = None  # with config.json of the transformers model that it is, or was made from

    @property
    def needs_domain(self) -> bool:
        """Whether it computes differently for different domains, of which it has several."""
        return len(self.registry.domains) > 1 and self.config.computes_by_domain


def open_model(path: Path) -> StoredModel:
    """Open a checkpoint, a submodel, or a directory of transformers'; ValueError in one line where it is none."""
    if (path / "config.json").is_file():
        return _open_hf(path)
    if (path / MANIFEST).is_file():
        return _of_checkpoint(open_checkpoint(path))
    state = f"holds neither {MANIFEST} (sigmoe) nor config.json (transformers)" if path.is_dir() else "does not exist"
    raise ValueError(f"{path} is no model: it {state}")


def open_unfinished(path: Path) -> StoredModel:
    """Open a model that is being written: all but its manifest is there."""
    return _open_hf(path) if (path / "config.json").is_file() else _of_checkpoint(Checkpoint(path, {}))


def load_model(
    stored: StoredModel,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backends: Backends = TORCH,
) -> Transformer:
    """Read the whole model, parameters rounded to `dtype`; for inference, without gradients."""
    with torch.device("meta"):
        model = Transformer(stored.config, stored.registry, backends)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    for name, tensor in canonical_tensors(model).items():
        tensor.copy_(stored.tensors.read(name))
    return model


def _of_checkpoint(checkpoint: Checkpoint) -> StoredModel:
    path = checkpoint.path
    try:
        config = from_mapping(ModelConfig, checkpoint.config.get("model"), "model")
        registry = DomainRegistry.from_json(checkpoint.registry)
        shapes = expected_shapes(config, registry)
    except ValueError as error:
        raise ValueError(f"{path}: config.yaml and registry.json describe no model: {error}") from error
    names = {name: name for name in shapes}
    tensors = _checked(path / "model", checkpoint.model, names, shapes, "config.yaml and registry.json say")
    length, step = checkpoint.config.get("sequence_length"), checkpoint.state.get("step")
    return StoredModel(
        path=path,
        format="sigmoe",
        config=config,
        registry=registry,
        tensors=tensors,
        tokenizer=checkpoint.tokenizer,
        sequence_length=length if isinstance(length, int) else None,
        step=step if isinstance(step, int) else None,
        hf_folder=path / CARRIED if (path / CARRIED / CONFIG).is_file() else None,
    )


def _open_hf(path: Path) -> StoredModel:
    data = read_json(path / "config.json")
    try:
        format, config = model_config(data)
        registry = config.build_registry(_domains(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    shapes = expected_shapes(config, registry)
    names = {name: hf_name(format, name) for name in shapes}
    ignored = ("lm_head.weight",) if config.tie_embeddings else ()
    tensors = _checked(path, TensorReader(path, "model"), names, shapes, "config.json says", ignored)
    tokenizer = path / "tokenizer.json"
    if not tokenizer.is_file() and path.name == "model":  # of a checkpoint, which has it one level up
        tokenizer = path.parent / "tokenizer.json"
    length = data.get("max_position_embeddings")
    return StoredModel(
        path=path,
        format=format,
        config=config,
        registry=registry,
        tensors=tensors,
        tokenizer=tokenizer.read_bytes() if tokenizer.is_file() else None,
        sequence_length=length if isinstance(length, int) else None,
        step=None,
        hf_folder=path,
    )


def _checked(
    folder: Path,
    tensors: TensorReader,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    said: str,
    ignored: tuple[str, ...] = (),
) -> TensorReader:
    """Return `tensors` under the canonical `names` (each stored as its value), every name and shape compared.

    `said` begins what an error says of the config; tensors `ignored` may be there as well.
    """
    held, wanted = set(tensors.names()), set(names.values())
    for stored in sorted(wanted - held):
        raise ValueError(f"{folder} lacks {stored}: {said} that it is there")
    for stored in sorted(held - wanted - set(ignored)):
        raise ValueError(f"{folder} holds {stored}: {said} nothing of it")
    for name, shape in shapes.items():
        if tensors.shape(names[name]) != shape:
            raise ValueError(f"{folder}: {names[name]} is {list(tensors.shape(names[name]))}, {said} {list(shape)}")
    return tensors.renamed(names)


def _domains(path: Path) -> tuple[str, ...]:
    """The domains of a model, as our commands noted beside it; a dense one may have several."""
    ours = (EXTRACTION, CONVERSION, *([PRUNING] if (path / MANIFEST).is_file() else []))  # others write report.json too
    for report in ours:
        if (path / report).is_file():
            domains = read_json(path / report).get("domains")
            if not isinstance(domains, list) or not domains or not all(isinstance(name, str) for name in domains):
                raise ValueError(f"{report} names no domain: it is damaged")
            return tuple(domains)
    return (ANY_DOMAIN,)


def read_json(path: Path) -> dict[str, Any]:
    """Return the group of keys in a JSON file; ValueError in one line where it is damaged."""
    try:
        data = load_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is damaged: it holds no group of keys")
    return data
