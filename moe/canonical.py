"""Canonical names: one key per global expert, Mixtral's names, whatever the tensors look like in memory."""

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .domains import DomainRegistry
from .model import Transformer

_EXPERT = re.compile(r"^model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.w[123]\.weight$")
_SLOT = re.compile(r"^(?:model\.embed_tokens|lm_head)\.slots\.(\d+)\.weight$")


def canonical_views(name: str, tensor: Tensor, experts: Sequence[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the canonical names behind the in-memory parameter `name`, each with its view of `tensor`.

    `tensor` is the parameter or anything of its shape: a gradient, a moment. `experts` are the ids of stacked experts;
    None: from 0 on.
    """
    prefix, _, leaf = name.rpartition(".")
    if leaf == "gate_up" and prefix.endswith("experts"):
        half = tensor.shape[1] // 2
        for place, expert in enumerate(experts or range(tensor.shape[0])):
            yield f"{prefix}.{expert}.w1.weight", tensor[place, :half]
            yield f"{prefix}.{expert}.w3.weight", tensor[place, half:]
    elif leaf == "down" and prefix.endswith("experts"):
        for place, expert in enumerate(experts or range(tensor.shape[0])):
            yield f"{prefix}.{expert}.w2.weight", tensor[place]
    elif leaf == "gate_up":
        half = tensor.shape[0] // 2
        yield f"{prefix}.gate_proj.weight", tensor[:half]
        yield f"{prefix}.up_proj.weight", tensor[half:]
    elif leaf == "down":
        yield f"{prefix}.down_proj.weight", tensor
    else:
        yield name, tensor


def canonical_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return views of every parameter and persistent buffer under its canonical name."""
    views: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=False).items():
            views.update(canonical_views(name, tensor))
    return views


def expert_of(name: str) -> tuple[int, int] | None:
    """Return (layer, expert) of an expert's canonical name, None for any other."""
    match = _EXPERT.match(name)
    return (int(match[1]), int(match[2])) if match else None


def slot_of(name: str) -> int | None:
    """Return the slot of an embedding's or head's canonical name, None where it has no slots and for any other."""
    match = _SLOT.match(name)
    return int(match[1]) if match else None


def is_parameter(name: str) -> bool:
    """Whether a canonical tensor is trained; route tables and selection biases are not, and keep their dtype."""
    return name.endswith(".weight")


def expected_shapes(config: ModelConfig, registry: DomainRegistry) -> dict[str, tuple[int, ...]]:
    """Return the shape of every canonical tensor of such a model, without allocating one."""
    with torch.device("meta"):
        model = Transformer(config, registry)
    return {name: tuple(tensor.shape) for name, tensor in canonical_tensors(model).items()}
