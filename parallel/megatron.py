"""The one door to Megatron-Core: process groups, and the mappings with gradients that surround a sharded product.

Importing it takes seconds: only runs of several processes do. What its mappings cannot do on a CPU (gathers and the
all-to-all ask CUDA for a device) is in `collectives.py`.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings
from torch import Tensor, distributed

from .config import ParallelConfig
from .mesh import Axis, Mesh


def build_mesh(parallel: ParallelConfig) -> Mesh:
    """Make the groups, once in the life of a process; torch.distributed is up. All processes call it together.

    Raises ValueError where the sizes do not divide the number of processes; `check_layout` says more, and sooner.
    """
    world = distributed.get_world_size()
    if world % parallel.tp or world % (parallel.ep * parallel.expert_tp):
        raise ValueError(f"{world} processes cannot be cut into tp={parallel.tp}, ep={parallel.ep}: see check_layout")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.expert_tp,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=parallel.timeout / 60,  # else 30 minutes, whatever torch's own groups have
    )
    return Mesh(
        world=_axis(distributed.group.WORLD),
        dp=_axis(parallel_state.get_data_parallel_group()),
        tp=_axis(parallel_state.get_tensor_model_parallel_group()),
        ep=_axis(parallel_state.get_expert_model_parallel_group()),
        etp=_axis(parallel_state.get_expert_tensor_parallel_group()),
        edp=_axis(parallel_state.get_expert_data_parallel_group()),
    )


def forget_groups() -> None:
    """Let another mesh be made in this process; for tests, which try many layouts.

    Megatron-Core makes dozens of groups a mesh and only drops its references to them: each keeps threads that spin.
    """
    parallel_state.destroy_model_parallel()
    for group in list(distributed.distributed_c10d._world.pg_map):
        if group is not distributed.group.WORLD:
            distributed.destroy_process_group(group)


def copy(x: Tensor, axis: Axis) -> Tensor:
    """Return `x`, the same on all; the gradient is summed over the axis. Goes before products of which each has a part.

    The gradient's memory is reused: nothing else may hold the gradient of the result, as it would if the result went
    into an addition as it is.
    """
    if axis.size == 1:
        return x
    return _Contiguous.apply(mappings.copy_to_tensor_model_parallel_region(x, axis.group))  # type: ignore[no-any-return, no-untyped-call]


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """Return the sum of `x` over the axis, in its memory; the gradient, the same on all, is handed on."""
    if axis.size == 1:
        return x
    summed: Tensor = mappings.reduce_from_tensor_model_parallel_region(x.contiguous(), axis.group)
    return summed


class _Contiguous(torch.autograd.Function):
    """Megatron-Core 0.16.1 reduces a contiguous copy of a strided gradient, then returns the unreduced original."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()


def _axis(group: Any) -> Axis:
    return Axis(group=group, rank=distributed.get_rank(group), size=distributed.get_world_size(group))
