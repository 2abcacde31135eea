"""Parameters that every process of an axis holds in full, masters and moments too: what is withheld from ZeRO."""

import torch
from torch import Tensor, nn

from .collectives import all_reduce
from .mesh import Axis, Mesh
from .segments import Interval, find_segments
from .shards import Sharding


class ReplicatedShards:
    """Named parameters as one interval, the same on all of `axis`; see `zero.ZeroShards` for the methods."""

    def __init__(self, parameters: dict[str, nn.Parameter], sharding: Sharding, mesh: Mesh, axis: Axis) -> None:
        self.parameters, self.axis = list(parameters.values()), axis
        self.master = torch.cat([parameter.detach().flatten().float() for parameter in self.parameters])
        self.gradient = torch.zeros_like(self.master)
        segments = find_segments(parameters.items(), sharding, mesh, 0, self.master.numel())
        self.intervals = [Interval(self.master, segments, rank=axis.rank)]

    def accumulate(self, *, last: bool) -> None:
        """Add the gradients of a backward; after the last one sum over processes."""
        for parameter, total in zip(self.parameters, self._split(self.gradient)):
            if parameter.grad is not None:
                total.add_(parameter.grad.flatten())
                parameter.grad = None
        if last:
            all_reduce(self.gradient, self.axis)

    def gradients(self) -> list[Tensor]:
        """Return the summed gradient."""
        return [self.gradient]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters."""
        for parameter, master in zip(self.parameters, self._split(self.master)):
            parameter.copy_(master.view_as(parameter))

    def forget(self) -> None:
        """Drop all gradients."""
        self.gradient.zero_()

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        return torch.split(flat, [parameter.numel() for parameter in self.parameters])
