"""The peers of the expert layer: transformers' experts (a grouped_mm composite, a loop), Liger's and moe-ops' kernels.

Imported by the worker that measures a peer. Liger's and moe-ops' run on a GPU alone.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from .moe_layer import Inputs


def peer(name: str, inputs: Inputs) -> Callable[[], Tensor]:
    """Return a peer's forward: liger, moe_ops, or an implementation of transformers' experts (grouped_mm, eager...)."""
    match name:
        case "liger":
            return _liger(inputs)
        case "moe_ops":
            return _moe_ops(inputs)
    return _transformers(name, inputs)


def _transformers(implementation: str, inputs: Inputs) -> Callable[[], Tensor]:
    E, D, F = inputs.down_EDF.shape
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E)
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = MixtralExperts(config)
    # Parameters would not be the leaves that gradients are asked for.
    del experts.gate_up_proj, experts.down_proj
    experts.gate_up_proj, experts.down_proj = inputs.gate_up_EGD, inputs.down_EDF
    return lambda: experts(inputs.x_TD, inputs.expert_TK, inputs.weight_TK)


def _liger(inputs: Inputs) -> Callable[[], Tensor]:
    fused = importlib.import_module("liger_kernel.ops").LigerFusedMoEFunction
    expert_TK = inputs.expert_TK.int()
    return lambda: fused.apply(inputs.x_TD, inputs.gate_up_EGD, inputs.down_EDF, expert_TK, inputs.weight_TK)


def _moe_ops(inputs: Inputs) -> Callable[[], Tensor]:
    moe_ops = importlib.import_module("moe_ops")
    expert_TK, (T, K) = inputs.expert_TK.int(), inputs.expert_TK.shape

    def forward() -> Tensor:
        rows_RD, row_of, bounds = moe_ops.permute(inputs.x_TD, expert_TK, E=inputs.down_EDF.shape[0])
        gate, up = moe_ops.grouped_gemm(rows_RD, inputs.gate_up_EGD, bounds, trans_b=True).chunk(2, -1)
        rows_RD = moe_ops.grouped_gemm(functional.silu(gate) * up, inputs.down_EDF, bounds, trans_b=True)
        out: Tensor = moe_ops.unpermute(rows_RD, row_of, inputs.weight_TK, num_tokens=T, num_topK=K)
        return out

    return forward
