"""Initial weights: every canonical tensor drawn by its own key, so no layout changes them."""

import numpy as np
import torch
from torch import Tensor

from .canonical import canonical_tensors
from .config import ModelConfig
from .keyed import numpy_generator
from .model import Transformer

_RESIDUAL = ("o_proj.weight", "w2.weight", "down_proj.weight")


def initialize(model: Transformer, seed: int) -> None:
    """Draw the weights of `model` in place; route tables stand as they are."""
    for name, tensor in canonical_tensors(model).items():
        if not name.endswith("route_table"):
            tensor.copy_(initial_value(model.config, name, tuple(tensor.shape), seed))


def initial_value(config: ModelConfig, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return a canonical tensor's initial value: normal(0, init_std), keyed by (seed, name); norms 1, biases 0.

    Products that write into the residual stream are drawn narrower by sqrt(2 layers) (GPT-2, Radford et al. 2019).
    """
    if name.endswith("e_score_correction_bias"):
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    std = config.init_std / (2 * config.num_layers) ** 0.5 if name.endswith(_RESIDUAL) else config.init_std
    return draw(name, shape, std, seed)


def draw(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Return fp32 normal(0, std) of `shape`, a pure function of (seed, name)."""
    # numpy's Philox takes the whole 64-bit key; torch's CPU generator keeps its lower half, where names soon collide.
    random = numpy_generator("weight", seed, name)
    return torch.from_numpy(random.standard_normal(shape, dtype=np.float32)).mul_(std)
