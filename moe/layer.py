"""A transformer block, dense or sparse.

Shape letters: B sequences, S positions, D model width.
"""

import torch
from torch import Tensor, nn

from ..kernels.backend import TORCH, Backend, Backends
from ..kernels.norm import add_rms_norm, rms_norm
from .attention import SelfAttention
from .cache import CacheStep, KeyValueCache
from .config import ModelConfig, num_experts
from .dispatch import Dispatcher, LocalDispatcher
from .domains import DomainRegistry
from .experts import DenseFFN, GroupedExperts
from .routers import build_router
from .routing import Routing, RoutingContext, RoutingStats


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight; fp32 statistics (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float, backend: Backend = "torch") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps, self.backend = eps, backend

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return rms_norm(x_BSD, self.weight, self.eps, backend=self.backend)

    def after(self, x_BSD: Tensor, branch_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual sum `x + branch`, and its norm."""
        return add_rms_norm(x_BSD, branch_BSD, self.weight, self.eps, backend=self.backend)


class MoELayer(nn.Module):
    """Router, dispatch, experts, combine. `dispatcher` may be replaced by one that spans processes."""

    def __init__(self, config: ModelConfig, registry: DomainRegistry, layer: int, backends: Backends = TORCH) -> None:
        super().__init__()
        index = config.sparse_layer_ids.index(layer)
        sets = registry.sets(index)
        self.layer, self.backends = layer, backends
        self.gate = build_router(config.router, layer, config.dim, config.vocab_size, sets, backends)
        self.experts = GroupedExperts(num_experts(registry, index), config.dim, config.expert_dim, backends.expert_mlp)
        self.dispatcher: Dispatcher[object] = LocalDispatcher(backends)  # type: ignore[assignment]

    def forward(self, x_BSD: Tensor, context: RoutingContext) -> tuple[Tensor, RoutingStats]:
        """Return the layer's output and what its router counted."""
        routing = self.gate(x_BSD, context)
        out_TD, receipt = self._through_experts(x_BSD.flatten(0, 1), routing)
        stats = RoutingStats(
            layer=self.layer,
            count_BE=routing.count_BE,
            balance_sum=routing.balance_sum,
            z_sum=routing.z_sum,
            dropped=self.dispatcher.dropped(receipt),
        )
        return out_TD.view_as(x_BSD), stats

    def _through_experts(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, object]:
        if self.backends.expert_mlp == "triton" and isinstance(self.dispatcher, LocalDispatcher):
            # All in one: the products fetch the tokens themselves.
            order = self.dispatcher.sort(routing)
            return self.experts(x_TD, order.positions.count_E, order), order
        rows_RD, count_E, receipt = self.dispatcher.dispatch(x_TD, routing)
        return self.dispatcher.combine(self.experts(rows_RD, count_E), receipt), receipt

    def extend(self, x_BSD: Tensor, context: RoutingContext) -> Tensor:
        """Return the layer's output outside training, all experts being here; nothing is counted, no autograd."""
        expert_TK, weight_TK = (choice_BSK.flatten(0, 1) for choice_BSK in self.gate.choices(x_BSD, context))
        return self.experts.extend(x_BSD.flatten(0, 1), expert_TK, weight_TK).view_as(x_BSD)


class Block(nn.Module):
    """Norm, attention, residual; norm, feed-forward or experts, residual."""

    def __init__(self, config: ModelConfig, registry: DomainRegistry, layer: int, backends: Backends = TORCH) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps, backends.norm)
        self.self_attn = SelfAttention(config, layer, backends)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps, backends.norm)
        self.is_sparse = layer in config.sparse_layer_ids
        if self.is_sparse:
            self.block_sparse_moe = MoELayer(config, registry, layer, backends)
        else:
            self.mlp = DenseFFN(config.dim, config.dense_dim, backends.swiglu)

    def forward(
        self, x_BSD: Tensor, start_BS: Tensor, position_BS: Tensor, context: RoutingContext
    ) -> tuple[Tensor, RoutingStats | None]:
        """Return the block's output, and its routing where it is sparse."""
        branch_BSD = self.self_attn(self.input_layernorm(x_BSD), start_BS, position_BS)
        x_BSD, normed_BSD = self.post_attention_layernorm.after(x_BSD, branch_BSD)
        if not self.is_sparse:
            return x_BSD + self.mlp(normed_BSD), None
        out_BSD, stats = self.block_sparse_moe(normed_BSD, context)
        return x_BSD + out_BSD, stats

    def extend(self, x_BSD: Tensor, step: CacheStep, context: RoutingContext, cache: KeyValueCache) -> Tensor:
        """Return the block's output for tokens that follow those in `cache`."""
        branch_BSD = self.self_attn.extend(self.input_layernorm(x_BSD), step, cache)
        x_BSD, normed_BSD = self.post_attention_layernorm.after(x_BSD, branch_BSD)
        if self.is_sparse:
            return x_BSD + self.block_sparse_moe.extend(normed_BSD, context)
        return x_BSD + self.mlp.extend(normed_BSD)
