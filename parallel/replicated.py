"""Parameters that every process of an axis holds in full, masters and moments too: what is withheld from ZeRO."""

import torch
from torch import Tensor, nn

from ..moe.precision import is_narrow, wide_dtype
from .collectives import all_reduce
from .mesh import Axis, Mesh
from .segments import Interval, find_segments
from .shards import Sharding


class ReplicatedShards:
    """Named parameters, an interval each, the same on all of `axis`; see `zero.ZeroShards` for the methods.

    An fp32 or fp64 parameter is its own master, and its `.grad` the sum of gradients; narrower ones have both beside
    them.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], sharding: Sharding, mesh: Mesh, axis: Axis) -> None:
        self.parameters, self.axis = list(parameters.values()), axis
        assert all(parameter.is_contiguous() for parameter in self.parameters), "a master would be a copy"
        self.wide: dict[nn.Parameter, Tensor] = {}  # sums of narrower gradients
        self.sums: list[Tensor] = []
        self.intervals = [
            Interval(
                parameter.detach().flatten().to(wide_dtype(parameter.dtype)),
                find_segments([(name, parameter)], sharding, mesh, 0, parameter.numel()),
                rank=axis.rank,
            )
            for name, parameter in parameters.items()
        ]

    def accumulate(self, *, last: bool) -> None:
        """Add the gradients of a backward; after the last one sum over processes."""
        for parameter in self.parameters:
            if is_narrow(parameter.dtype) and parameter.grad is not None:
                more, total = parameter.grad.float(), self.wide.get(parameter)
                self.wide[parameter] = more if total is None else total.add_(more)
                parameter.grad = None
        if last:
            self.sums = [all_reduce(self._sum(parameter).flatten(), self.axis) for parameter in self.parameters]

    def gradients(self) -> list[Tensor]:
        """Return the summed gradient of each interval, in fp32 at least."""
        return self.sums

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into narrower parameters."""
        for parameter, interval in zip(self.parameters, self.intervals):
            if is_narrow(parameter.dtype):
                parameter.copy_(interval.master.view_as(parameter))

    def forget(self) -> None:
        """Drop all gradients."""
        self.sums = []
        self.wide.clear()
        for parameter in self.parameters:
            parameter.grad = None

    def _sum(self, parameter: nn.Parameter) -> Tensor:
        """Return what this process has added up, zeros where no backward reached the parameter."""
        total = self.wide.get(parameter, parameter.grad)
        return torch.zeros_like(parameter, dtype=wide_dtype(parameter.dtype)) if total is None else total
