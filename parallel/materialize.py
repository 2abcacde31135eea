"""Memory and initial values for a model on the meta device, by shard: no process ever holds what it does not own."""

import torch
from torch import nn

from ..moe.initialize import initial_value
from ..moe.model import Transformer
from .shards import Sharding


def cut_parameters(model: Transformer, sharding: Sharding) -> None:
    """Replace every parameter of a model on the meta device by one of its local shape."""
    for name, parameter in list(model.named_parameters()):
        shape = sharding.local_shape(name, tuple(parameter.shape))
        if shape != tuple(parameter.shape):
            owner, _, leaf = name.rpartition(".")
            cut = nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device=parameter.device))
            setattr(model.get_submodule(owner), leaf, cut)


@torch.no_grad()
def materialize(model: Transformer, sharding: Sharding, *, seed: int, device: torch.device) -> None:
    """Allocate and draw what is here; the same values whatever the layout. Route tables are zeros: fill them after."""
    model.to_empty(device=device)
    for tensor in model.state_dict(keep_vars=False).values():
        tensor.zero_()  # the padding of the vocabulary stays so
    for name, shard in sharding.all(model).items():
        if not name.endswith("route_table"):
            # One whole tensor at a time is drawn, on the host.
            shard.tensor.copy_(shard.part(initial_value(model.config, name, shard.shape, seed)))
