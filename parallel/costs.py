"""Bytes that a process holds and sends under ZeRO: pure arithmetic on config and layout, held to measurements by tests.

Activations and the collectives of tensor and expert parallelism are not in here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..moe.config import ModelConfig
from ..moe.domains import DomainRegistry
from ..moe.model import Transformer
from .config import ParallelConfig
from .mesh import Axis, Mesh
from .shards import Sharding

BUCKET = 50_000_000  # elements that are summed in one collective, at the most
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that a process holds."""

    parameters: int
    gradients: int  # when the last backward of a step ends: its own, and the sums so far
    buckets: int  # what gradients pass through while they are summed
    optimizer: int  # masters and two moments, all fp32; in host memory where offloaded

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.parameters + self.gradients + self.buckets + self.optimizer


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a process hands to the data-parallel collectives of one step, by axis."""

    reduced: dict[str, int]  # all-reduce of gradients
    gathered: dict[str, int]  # all-gather of parameters: what comes out
    agreed: int  # all-reduce over the world of norm and finiteness


@dataclass(frozen=True)
class _Group:
    """Parameters of one kind and dtype, which ZeRO cuts into even intervals."""

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
) -> Footprint:
    """Return what a process of this mesh holds; the mesh's groups may be None.

    A backward leaves gradients of the parameters' dtype in full; those of backwards before it stand in fp32: those of
    all parameters under stage 1 (the same memory where parameters are fp32), of the interval under stage 2.
    """
    groups = list(_groups(config, registry, mesh, dtype))
    narrow = dtype != torch.float32
    gradients = sum(group.size * group.dtype.itemsize for group in groups)
    intervals = sum(group.padded // group.axis.size for group in groups)
    if parallel.zero_stage == 1 and narrow:
        gradients = sum(group.size * _FP32 for group in groups)
        # The last backward's own are still there with the sums of those before.
        gradients += sum(group.size * group.dtype.itemsize for group in groups) if accumulation > 1 else 0
    elif parallel.zero_stage == 2 and accumulation > 1:
        gradients += intervals * _FP32
    total = sum(group.size for group in groups)
    return Footprint(
        parameters=sum(group.padded * group.dtype.itemsize for group in groups),
        gradients=gradients,
        buckets=min(total, BUCKET) * _FP32,
        optimizer=3 * _FP32 * intervals,
    )


def traffic(
    config: ModelConfig,
    registry: DomainRegistry,
    mesh: Mesh,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    *,
    accumulation: int = 1,
) -> Traffic:
    """Return what a process hands to collectives in a step; axes of one process send nothing.

    Gradients are summed in fp32: once a step under stage 1, after every backward under stage 2.
    """
    times = accumulation if parallel.zero_stage == 2 else 1
    reduced, gathered = {"dp": 0, "edp": 0}, {"dp": 0, "edp": 0}
    for group in _groups(config, registry, mesh, dtype):
        if group.axis.size > 1:
            reduced[group.axis_name] += times * group.size * _FP32
            gathered[group.axis_name] += group.padded * group.dtype.itemsize
    return Traffic(reduced=reduced, gathered=gathered, agreed=16 if mesh.world.size > 1 else 0)


def _groups(config: ModelConfig, registry: DomainRegistry, mesh: Mesh, dtype: torch.dtype) -> Iterator[_Group]:
    """Yield dense and expert parameters here; the routers' gates stay fp32."""
    sharding = Sharding(config, registry, mesh)
    with torch.device("meta"):
        model = Transformer(config, registry)
    sizes: dict[tuple[str, torch.dtype], int] = {}
    for name, parameter in model.named_parameters():
        axis = "dp" if sharding.experts(name) is None else "edp"
        key = axis, torch.float32 if name.endswith("gate.weight") else dtype
        size = torch.Size(sharding.local_shape(name, tuple(parameter.shape))).numel()
        sizes[key] = sizes.get(key, 0) + size
    for (axis, kind), size in sizes.items():
        yield _Group(axis, mesh.dp if axis == "dp" else mesh.edp, kind, size)
