"""Whether a run fits into this machine's memory; activations are not counted."""

import torch

from ..moe.counts import count_parameters
from ..moe.domains import DomainRegistry
from ..moe.precision import wide_dtype
from ..parallel.mesh import Mesh
from .layout_costs import DTYPES, rank_bytes, rank_footprint
from .memory import host_memory
from .train_config import TrainConfig
from .trainer import pick_device


def check_memory(config: TrainConfig, registry: DomainRegistry, mesh: Mesh, processes: int) -> None:
    """Raise ValueError where masters, gradients and two moments do not fit, or with them the copy that a save takes.

    `processes` share this machine's memory.
    """
    on_gpu, host = pick_device(config.device) == "cuda", host_memory()
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if on_gpu else host
    total = count_parameters(config.model, registry).total
    wide = wide_dtype(DTYPES[config.precision]).itemsize * total
    needed, copied, on_host = 4 * wide, 3 * wide, 0 if on_gpu else 4 * wide
    if mesh.world.size > 1:
        held = rank_footprint(config, registry, mesh)
        needed = rank_bytes(config, registry, mesh, on_gpu=on_gpu) * (1 if on_gpu else processes)
        offloaded = held.optimizer * processes if config.parallel.offload == "cpu" else 0
        copied, on_host = held.snapshot * processes, offloaded if on_gpu else needed
    model = f"a model of {total:,} parameters needs at least"
    where = "" if mesh.world.size == 1 else " on this machine"
    if needed > memory:
        there = f"{_gb(needed)}{where} to train, there are {_gb(memory)}"
        raise ValueError(f"{model} {there}: make it smaller")
    if config.save.beside_training and on_host + copied > host:
        both = f"{_gb(on_host + copied)} of host memory{where} while a copy of its state is saved"
        raise ValueError(f"{model} {both}, there are {_gb(host)}: give save.background=false")


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 10**9 else f"{size / 1e9:.2g} GB"
