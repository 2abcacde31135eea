"""What a run's layout costs a rank, by formula: bytes that it holds, bytes that it sends in a step, and a line of both.

Shape letters: E experts, N domains.
"""

import torch

from ..moe.config import layer_experts
from ..moe.domains import DomainRegistry
from ..parallel.costs import Footprint, footprint
from ..parallel.mesh import Mesh
from ..parallel.traffic import MicroBatch, Traffic, step_traffic
from .train_config import TrainConfig

# Of parameters and activations, by precision.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def rank_footprint(config: TrainConfig, registry: DomainRegistry, mesh: Mesh) -> Footprint:
    """Return the bytes of parameters, gradients and optimizer state on this rank; activations do not count."""
    accumulation = config.global_batch // (mesh.dp.size * config.micro_size(mesh.dp.size))
    dtype = DTYPES[config.precision]
    return footprint(config.model, registry, mesh, config.parallel, dtype, accumulation=accumulation)


def rank_bytes(config: TrainConfig, registry: DomainRegistry, mesh: Mesh, *, on_gpu: bool) -> int:
    """Return the least memory that this rank takes; what is offloaded from a GPU does not count."""
    held = rank_footprint(config, registry, mesh)
    return held.total - (held.optimizer if on_gpu and config.parallel.offload == "cpu" else 0)


def rank_traffic(config: TrainConfig, registry: DomainRegistry, mesh: Mesh, device: str) -> Traffic:
    """Return what this rank sends in a step whose rows are routed evenly."""
    size = config.micro_size(mesh.dp.size)
    micro = MicroBatch.balanced(config.model, mesh, size * config.sequence_length)
    micros = [micro] * (config.global_batch // (mesh.dp.size * size))
    dtype = DTYPES[config.precision]
    total = step_traffic(config.model, registry, mesh, config.parallel, dtype, micros, device=device)
    return total + loop_traffic(config, registry, mesh)


def loop_traffic(config: TrainConfig, registry: DomainRegistry, mesh: Mesh) -> Traffic:
    """Return what `Trainer.train_step` itself sums over dp: labels, losses by domain, selections `[N, E]` by layer."""
    if mesh.dp.size == 1:
        return Traffic()
    domains = len(registry.domains)
    experts = sum(layer_experts(config.model, registry))
    return Traffic({("dp", "all_reduce"): 8 * (1 + 2 * domains + 3 + domains * experts)})


def layout_note(config: TrainConfig, registry: DomainRegistry, mesh: Mesh, device: str) -> str:
    """Return the line that tells the user both."""
    held, sent = rank_footprint(config, registry, mesh), rank_traffic(config, registry, mesh, device)
    by_axis = {axis: sum(size for (other, _), size in sent.items() if other == axis) for axis, _ in sent}
    on_host = " in host memory" if config.parallel.offload == "cpu" else ""
    saved = f", in host memory {_mb(held.snapshot)} while it is saved in mid-run" if config.save.beside_training else ""
    return (
        f"a rank holds {_mb(held.parameters)} of parameters, {_mb(held.gradients)} of gradients, "
        f"{_mb(held.optimizer)} of optimizer state{on_host}{saved}; with rows routed evenly it sends a step "
        + ", ".join(f"{axis} {_mb(size)}" for axis, size in by_axis.items() if axis != "world")
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
