"""Bytes that a process holds under ZeRO: pure arithmetic on config and layout, held to measurements by tests.

Activations are not in here; what a process sends is in `traffic.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..moe.config import ModelConfig
from ..moe.domains import DomainRegistry
from ..moe.model import Transformer
from ..moe.precision import is_narrow, wide_dtype
from .config import ParallelConfig
from .mesh import Axis, Mesh
from .shards import Sharding

BUCKET = 50_000_000  # elements that are summed in one collective, at the most


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that a process holds."""

    parameters: int
    gradients: int  # when the last backward of a step ends: its own, and the sums so far
    buckets: int  # what gradients pass through while they are summed
    optimizer: int  # masters and two moments, fp32 or fp64; in host memory where offloaded
    snapshot: int  # their copy in host memory, at most, while a checkpoint is written in the background

    @property
    def total(self) -> int:
        """Bytes of everything that always stands."""
        return self.parameters + self.gradients + self.buckets + self.optimizer


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters of one kind and dtype here, which ZeRO cuts into even intervals over the axis."""

    axis_name: str
    axis: Axis
    dtype: torch.dtype
    size: int

    @property
    def padded(self) -> int:
        """Elements with DeepSpeed's alignment: every interval is of an even size."""
        return -(-self.size // (2 * self.axis.size)) * 2 * self.axis.size


def footprint(
    config: ModelConfig,
    registry: DomainRegistry,
    mesh: Mesh,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    *,
    accumulation: int = 1,
    experts_outside: bool = False,
) -> Footprint:
    """Return what a process of this mesh holds; the mesh's groups may be None.

    A backward leaves gradients of the parameters' dtype in full; those of backwards before it stand in fp32 (fp64): of
    the interval under stage 2, else of all parameters, in the same memory where parameters are as wide. What is not
    under ZeRO (see `ZeroEngine`) stands in full, and needs no other masters where it is not narrower.
    """
    item = wide_dtype(dtype).itemsize
    parameters = gradients = optimizer = snapshot = 0
    buckets = {"dp": 0, "edp": 0}
    for group in parameter_groups(config, registry, mesh, dtype):
        withheld = shares_nothing(group.axis, parallel) or (experts_outside and group.axis_name == "edp")
        own, wide = group.size * group.dtype.itemsize, group.size * item
        interval = group.size if withheld else group.padded // group.axis.size
        parameters += own if withheld else group.padded * group.dtype.itemsize
        optimizer += (3 if not withheld or is_narrow(group.dtype) else 2) * item * interval
        snapshot += 3 * item * interval if not withheld or group.axis.rank == 0 else 0
        buckets[group.axis_name] += 0 if withheld else group.size
        if withheld or parallel.zero_stage == 1:
            # Wide sums beside the last backward's own; with one backward a step those are gone when these stand.
            narrow = is_narrow(group.dtype if withheld else dtype)
            gradients += (own + wide if accumulation > 1 else wide) if narrow else own
        else:
            gradients += own + (interval * item if accumulation > 1 else 0)
    return Footprint(
        parameters=parameters,
        gradients=gradients,
        buckets=sum(min(size, BUCKET) * item for size in buckets.values()),
        optimizer=optimizer,
        snapshot=snapshot,
    )


def shares_nothing(axis: Axis, parallel: ParallelConfig) -> bool:
    """Whether ZeRO has nothing to do for parameters on this axis: one process has them, and nothing is offloaded."""
    return axis.size == 1 and parallel.offload == "none"


def parameter_groups(
    config: ModelConfig, registry: DomainRegistry, mesh: Mesh, dtype: torch.dtype
) -> Iterator[ParameterGroup]:
    """Yield dense ("dp") and expert ("edp") parameters; the routers' gates are never narrow."""
    sharding = Sharding(config, registry, mesh)
    with torch.device("meta"):
        model = Transformer(config, registry)
    sizes: dict[tuple[str, torch.dtype], int] = {}
    for name, parameter in model.named_parameters():
        axis = "dp" if sharding.experts(name) is None else "edp"
        key = axis, wide_dtype(dtype) if name.endswith("gate.weight") else dtype
        size = torch.Size(sharding.local_shape(name, tuple(parameter.shape))).numel()
        sizes[key] = sizes.get(key, 0) + size
    for (axis, kind), size in sizes.items():
        yield ParameterGroup(axis, mesh.dp if axis == "dp" else mesh.edp, kind, size)
