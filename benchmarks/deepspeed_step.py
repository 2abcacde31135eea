"""The peer: DeepSpeed's own MoE layer in sigmoe's Transformer, driven by its engine as its users do.

The only file that imports deepspeed for a benchmark; it is imported by the worker that measures this peer.
"""

import logging

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import logger
from torch import Tensor, nn

from ..moe.experts import DenseFFN
from ..moe.initialize import initialize
from ..moe.layer import Block, MoELayer
from ..moe.model import Transformer
from ..moe.routing import RoutingContext, RoutingStats
from .train_step import OPTIMIZER, Step, StepShape, loss_function


def deepspeed_step(shape: StepShape, option: str) -> Step:
    """Return one training step under ZeRO stage 1.

    `option` is `dropless` or a capacity factor, then `torch` or `sigmoe`, whose products the experts use. The step
    returns this process's part of the loss.
    """
    capacity, _, products = option.partition(" ")
    logger.setLevel(logging.WARNING)
    model = Transformer(shape.model, shape.model.build_registry(("text",)))
    initialize(model, 0)
    for block in model.modules():
        if isinstance(block, Block) and block.is_sparse:
            block.add_module("block_sparse_moe", _Layer(block.block_sparse_moe, shape, capacity, products))
    model.train()
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    optimizer = torch.optim.AdamW(
        groups,
        lr=OPTIMIZER.lr,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.eps,
        weight_decay=OPTIMIZER.weight_decay,
        fused=True,
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": shape.batch // shape.ranks,
            "gradient_clipping": OPTIMIZER.clip_norm,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
        },
    )
    loss_of = loss_function(engine, shape)

    def step(number: int) -> float:
        loss = loss_of(number)
        engine.backward(loss * shape.ranks)  # it takes means
        engine.step()
        return float(loss.detach())

    return step


class _Layer(nn.Module):
    """Takes the place of a `MoELayer`, with its weights."""

    def __init__(self, layer: MoELayer, shape: StepShape, capacity: str, products: str) -> None:
        super().__init__()
        router, model = shape.model.router, shape.model
        self.layer = layer.layer
        expert = (_Expert if products == "torch" else DenseFFN)(model.dim, model.expert_dim)
        self.moe = MoE(
            model.dim,
            expert,
            num_experts=router.num_experts,
            ep_size=shape.ranks,
            k=router.top_k,
            drop_tokens=capacity != "dropless",
            capacity_factor=1.0 if capacity == "dropless" else float(capacity),
            top2_2nd_expert_sampling=False,  # noise costs time, and Mixtral's gate has none
        )
        inner = self.moe.deepspeed_moe
        first = shape.rank * self.moe.num_local_experts
        with torch.no_grad():
            inner.gate.wg.weight.copy_(layer.gate.weight)
            for place, own in enumerate(inner.experts.deepspeed_experts):
                gate_up, down = own.parameters()
                gate_up.copy_(layer.experts.gate_up[first + place])
                down.copy_(layer.experts.down[first + place])

    def forward(self, x_BSD: Tensor, context: RoutingContext) -> tuple[Tensor, RoutingStats]:
        """Return the layer's output, and its balance loss where ours is."""
        out_BSD, balance, count_E = self.moe(x_BSD)
        zero = balance.new_zeros(())
        tokens = x_BSD.shape[0] * x_BSD.shape[1]
        return out_BSD, RoutingStats(
            layer=self.layer, count_BE=count_E, balance_sum=balance * tokens, z_sum=zero, dropped=zero
        )


class _Expert(nn.Module):
    """The SwiGLU feed-forward in torch's own words."""

    def __init__(self, dim: int, expert_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * expert_dim, bias=False)
        self.down = nn.Linear(expert_dim, dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Apply the feed-forward to every token."""
        gate, up = self.gate_up(x_BSD).chunk(2, -1)
        out_BSD: Tensor = self.down(nn.functional.silu(gate) * up)
        return out_BSD
