"""The three routers: a global learned gate, a learned gate inside a domain's set, and a fixed table inside the set.

Shape letters: B sequences, S positions, D model width, V vocabulary, E experts, K top-k, N balance groups.
"""

import math

import torch
from torch import Tensor, nn

from ..kernels.backend import TORCH, Backends
from ..kernels.gate import Gate, choose, gate, table_gate
from .balance import batch_balance_sum, sequence_balance_sum
from .config import RouterConfig
from .keyed import keyed_uniform, seed_of
from .precision import wide_dtype
from .routing import Routing, RoutingContext, merge_groups


class LearnedGate(nn.Module):
    """What the learned routers share: a linear gate (fp32 or fp64) over some experts, its balance sums, its jitter."""

    def __init__(
        self, config: RouterConfig, layer: int, dim: int, num_experts: int, backends: Backends = TORCH
    ) -> None:
        super().__init__()
        self.config, self.layer, self.num_experts, self.backend = config, layer, num_experts, backends.gate
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        if config.balance == "bias":
            self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))

    def jittered(self, x_BSD: Tensor, context: RoutingContext) -> Tensor:
        """Return the gate's input; in training times uniform noise, keyed by (seed, step, layer, global token)."""
        x_BSD = _widened(x_BSD)
        if context.training is None or self.config.jitter == 0:
            return x_BSD
        key = seed_of("jitter", context.training.seed, context.training.step, self.layer)
        noise = keyed_uniform(key, context.index_T, x_BSD.shape[-1]).view_as(x_BSD)
        return x_BSD * (1 + self.config.jitter * (2 * noise - 1))

    def choose(self, x_BSD: Tensor, experts: Tensor | None) -> Gate:
        """Run the gate over `experts` alone (None: all), so that a submodel of them does the same arithmetic."""
        logits_BSE, bias_E = self.logits(x_BSD, experts)
        renormalize = self.config.renormalize
        return gate(logits_BSE, self.config.top_k, bias_E=bias_E, renormalize=renormalize, backend=self.backend)

    def choose_alone(self, x_BSD: Tensor, experts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the gate's choices over `experts` and their weights, `[B, S, K]`, without sums and autograd."""
        logits_BSE, bias_E = self.logits(x_BSD, experts)
        return choose(logits_BSE, self.config.top_k, bias_E=bias_E, renormalize=self.config.renormalize)[:2]

    def logits(self, x_BSD: Tensor, experts: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the logits of fp32 `x_BSD` over `experts` (None: all), and the selection bias of these, if any."""
        weight_ED, bias_E = _widened(self.weight), self._buffers.get("e_score_correction_bias")
        if experts is not None:
            weight_ED = weight_ED[experts]
            bias_E = None if bias_E is None else bias_E[experts]
        return nn.functional.linear(x_BSD, weight_ED), bias_E

    def balance_sum(self, chosen: Gate, context: RoutingContext, group: int, experts: Tensor | None) -> Tensor:
        """Return the balance loss of the tokens that `chosen` routed, summed over them; 0 where it is not asked for."""
        if context.training is None or self.config.balance != "loss":
            return chosen.prob_BE.new_zeros(())
        if self.config.balance_scope == "batch":
            fraction_E = context.training.fractions[self.layer][group].to(chosen.prob_BE.device)
            return batch_balance_sum(fraction_E if experts is None else fraction_E[experts], chosen.prob_BE)
        return sequence_balance_sum(chosen.count_BE, chosen.prob_BE, self.config.top_k, chosen.expert_BSK.shape[1])


class TopKRouter(LearnedGate):
    """A learned softmax gate over all experts: top-K, ties to the lower id."""

    def forward(self, x_BSD: Tensor, context: RoutingContext) -> Routing:
        """Route every token of `x_BSD`."""
        chosen = self.choose(self.jittered(x_BSD, context), None)
        return Routing(
            expert_BSK=chosen.expert_BSK,
            weight_BSK=chosen.weight_BSK,
            count_BE=chosen.count_BE,
            balance_sum=self.balance_sum(chosen, context, 0, None),
            z_sum=chosen.z_B.sum(),
            num_experts=self.num_experts,
            capacity_B=_capacity(self.config, context, [self.num_experts] * x_BSD.shape[0], x_BSD.device),
        )

    def choices(self, x_BSD: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor]:
        """Return experts and weights `[B, S, K]` outside training, nothing counted, no autograd."""
        return self.choose_alone(_widened(x_BSD), None)


class DomainTopKRouter(LearnedGate):
    """Level 1: the sequence's domain gives the set. Level 2: a learned gate over that set alone."""

    def __init__(
        self,
        config: RouterConfig,
        layer: int,
        dim: int,
        sets: tuple[tuple[int, ...], ...],
        backends: Backends = TORCH,
    ) -> None:
        super().__init__(config, layer, dim, 1 + max(max(experts) for experts in sets), backends)
        self.sets = sets

    def forward(self, x_BSD: Tensor, context: RoutingContext) -> Routing:
        """Route every token of `x_BSD` inside its domain's set: one gate product a domain."""
        x_BSD = self.jittered(x_BSD, context)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        balance_sum = z_sum = x_BSD.new_zeros(())
        for group in context.groups:
            experts = torch.tensor(self.sets[group.domain], device=x_BSD.device)
            chosen = self.choose(group.of(x_BSD), experts)
            count_BE = chosen.count_BE.new_zeros(chosen.count_BE.shape[0], self.num_experts)
            count_BE[:, experts] = chosen.count_BE
            parts.append((experts[chosen.expert_BSK], chosen.weight_BSK, count_BE))
            balance_sum = balance_sum + self.balance_sum(chosen, context, group.domain, experts)
            z_sum = z_sum + chosen.z_B.sum()
        expert_BSK, weight_BSK, count_BE = (merge_groups(context.groups, [part[i] for part in parts]) for i in range(3))
        return Routing(
            expert_BSK=expert_BSK,
            weight_BSK=weight_BSK,
            count_BE=count_BE,
            balance_sum=balance_sum,
            z_sum=z_sum,
            num_experts=self.num_experts,
            capacity_B=_capacity(self.config, context, _set_sizes(context, self.sets), x_BSD.device),
        )

    def choices(self, x_BSD: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor]:
        """Return experts and weights `[B, S, K]` outside training, nothing counted, no autograd."""
        parts = []
        for group in context.groups:
            experts = torch.tensor(self.sets[group.domain], device=x_BSD.device)
            place_BSK, weight_BSK = self.choose_alone(_widened(group.of(x_BSD)), experts)
            parts.append((experts[place_BSK], weight_BSK))
        expert_BSK, weight_BSK = (merge_groups(context.groups, [part[i] for part in parts]) for i in range(2))
        return expert_BSK, weight_BSK


class RandomRoutedExperts(nn.Module):
    """PanGu-Sigma's random routed experts: a fixed table over token ids inside the set; K 1, weight 1, no gate.

    `route_table`: int32 [domains, V], positions inside the domain's set.
    """

    route_table: Tensor

    def __init__(
        self,
        config: RouterConfig,
        layer: int,
        vocab_size: int,
        sets: tuple[tuple[int, ...], ...],
        backends: Backends = TORCH,
    ) -> None:
        super().__init__()
        self.config, self.layer, self.sets, self.backend = config, layer, sets, backends.gate
        self.num_experts = 1 + max(max(experts) for experts in sets)
        self.register_buffer("route_table", torch.zeros(len(sets), vocab_size, dtype=torch.int32))

    def forward(self, x_BSD: Tensor, context: RoutingContext) -> Routing:
        """Route every token by (domain, token id)."""
        chosen = self._look_up(context)
        zero = torch.zeros((), device=x_BSD.device)
        return Routing(
            expert_BSK=chosen.expert_BSK,
            weight_BSK=chosen.weight_BSK,
            count_BE=chosen.count_BE,
            balance_sum=zero,
            z_sum=zero,
            num_experts=self.num_experts,
            capacity_B=_capacity(self.config, context, _set_sizes(context, self.sets), x_BSD.device),
        )

    def choices(self, x_BSD: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor]:
        """Return experts and weights `[B, S, 1]`, nothing counted."""
        chosen = self._look_up(context)
        return chosen.expert_BSK, chosen.weight_BSK

    def _look_up(self, context: RoutingContext) -> Gate:
        token_BS, longest = context.token_BS, max(map(len, self.sets))
        sets_NM = torch.tensor([[*experts, *[0] * (longest - len(experts))] for experts in self.sets])
        domain_B = torch.tensor(_domains(context), device=token_BS.device)
        sets_NM, E = sets_NM.to(token_BS.device), self.num_experts
        return table_gate(token_BS, domain_B, self.route_table, sets_NM, E, backend=self.backend)


Router = TopKRouter | DomainTopKRouter | RandomRoutedExperts


def build_router(
    config: RouterConfig,
    layer: int,
    dim: int,
    vocab_size: int,
    sets: tuple[tuple[int, ...], ...],
    backends: Backends = TORCH,
) -> Router:
    """Build layer `layer`'s router over the domains' expert `sets`."""
    match config.name:
        case "top_k":
            return TopKRouter(config, layer, dim, 1 + max(max(experts) for experts in sets), backends)
        case "domain_top_k":
            return DomainTopKRouter(config, layer, dim, sets, backends)
        case "rre":
            return RandomRoutedExperts(config, layer, vocab_size, sets, backends)


def _widened(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x.dtype))


def _capacity(config: RouterConfig, context: RoutingContext, sizes: list[int], device: torch.device) -> Tensor | None:
    """C = ceil(factor K S / E_group) a sequence, in training only; `sizes` is E_group of each sequence."""
    if config.capacity_factor is None or context.training is None:
        return None
    length = context.token_BS.shape[1]
    rows = [math.ceil(config.capacity_factor * config.top_k * length / size) for size in sizes]
    return torch.tensor(rows, device=device)


def _set_sizes(context: RoutingContext, sets: tuple[tuple[int, ...], ...]) -> list[int]:
    """Return the size of each sequence's set."""
    return [len(sets[domain]) for domain in _domains(context)]


def _domains(context: RoutingContext) -> list[int]:
    """Return each sequence's domain."""
    domains = [0] * context.token_BS.shape[0]
    for group in context.groups:
        for row in range(len(domains)) if group.rows is None else group.rows.tolist():
            domains[row] = group.domain
    return domains
