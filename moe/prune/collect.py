"""Collects the sums of one batch in one sparse layer, while a streamed model runs.

The forward is fp32, as it stands; everything derived from it is float64.

Shape letters: B sequences, S positions, T tokens (B*S), D model width, E experts, K top-k, R routed rows, C tokens of a
chunk.
"""

import dataclasses
from itertools import combinations

import torch
from torch import Tensor

from ...kernels.gate import choose
from ..config import RouterConfig
from ..dispatch import LocalReceipt
from ..routers import LearnedGate, Router
from ..routing import Routing, RoutingContext
from .sums import LayerSums

_CHUNK = 256  # tokens or rows that are widened to float64 at a time


class Collector:
    """A `Watcher` of one batch; `sums` are those of the last layer it passed.

    With `subsets` every token goes through every expert of the layer, so that the output of each subset is known.
    """

    sums: LayerSums

    def __init__(self, router: RouterConfig, *, subsets: bool) -> None:
        self._router, self._subsets = router, subsets

    def route(self, gate: Router, x_BSD: Tensor, context: RoutingContext) -> Routing:
        """Route as the gate does; with `subsets` the other experts follow, at weight 0, which adds exact zeros."""
        assert isinstance(gate, LearnedGate)
        routing: Routing = gate(x_BSD, context)
        logits_BSE, self._bias_E = gate.logits(x_BSD.float(), None)
        self._logits_TE = logits_BSE.flatten(0, 1)
        self._expert_TK, self._weight_TK = routing.expert_BSK.flatten(0, 1), routing.weight_BSK.flatten(0, 1).double()
        if not self._subsets:
            return routing
        B, S, E = logits_BSE.shape
        others = torch.ones_like(logits_BSE, dtype=torch.bool).scatter_(-1, routing.expert_BSK, False)
        expert_BSE = torch.cat([routing.expert_BSK, others.nonzero()[:, -1].view(B, S, -1)], -1)
        self._order_TE = expert_BSE.flatten(0, 1)
        zero_BSN = routing.weight_BSK.new_zeros(B, S, E - routing.weight_BSK.shape[-1])
        weight_BSE = torch.cat([routing.weight_BSK, zero_BSN], -1)
        return dataclasses.replace(routing, expert_BSK=expert_BSE, weight_BSK=weight_BSE)

    def see(self, before_BSD: Tensor, rows_RD: Tensor, receipt: object, after_BSD: Tensor) -> None:
        """Compute the layer's sums."""
        assert isinstance(receipt, LocalReceipt)
        T, K = self._expert_TK.shape
        E = self._logits_TE.shape[1]
        row_TK = receipt.positions.row_TK
        norm_TK = _norms(rows_RD)[row_TK[:, :K]]
        gated_TK = self._weight_TK * norm_TK
        turned_T = (1 - _cosines(before_BSD.flatten(0, 1), after_BSD.flatten(0, 1))).clamp(min=0)
        prob_TE = torch.softmax(self._logits_TE, -1).double()
        self.sums = LayerSums(
            tokens=T,
            count_E=torch.bincount(self._expert_TK.flatten(), minlength=E),
            gate_E=self._by_expert(self._weight_TK),
            norm_E=self._by_expert(norm_TK),
            gate_norm_E=self._by_expert(gated_TK),
            easy_ep_E=self._by_expert(gated_TK * turned_T[:, None]),
            prob_EE=prob_TE.T @ prob_TE,
            subset_error=self._subset_errors(rows_RD, row_TK) if self._subsets else None,
        )

    def _by_expert(self, value_TK: Tensor) -> Tensor:
        sum_E = torch.zeros(self._logits_TE.shape[1], dtype=torch.float64)
        return sum_E.index_add_(0, self._expert_TK.flatten(), value_TK.flatten())

    def _subset_errors(self, rows_RD: Tensor, row_TN: Tensor) -> Tensor:
        """Return `LayerSums.subset_error` of the batch, all experts having all tokens.

        F - F_S is a sum of c_e f_e, c being the difference of the weights: its square is c G c with the Gram matrix G
        of a token's expert outputs, which is computed once for all subsets.
        """
        T, E = self._logits_TE.shape
        row_TE = torch.empty_like(row_TN).scatter_(1, self._order_TE, row_TN)
        gram_TEE = torch.empty(T, E, E, dtype=torch.float64)
        for begin in range(0, T, _CHUNK):
            output_CED = rows_RD[row_TE[begin : begin + _CHUNK]].double()
            gram_TEE[begin : begin + _CHUNK] = output_CED @ output_CED.mT
        whole_TE = torch.zeros(T, E, dtype=torch.float64).scatter_(1, self._expert_TK, self._weight_TK)
        error = torch.full((1 << E,), torch.inf, dtype=torch.float64)
        for size in range(self._router.top_k, E + 1):
            for subset in combinations(range(E), size):
                change_TE = whole_TE - self._weights_over(subset)
                square_T = (change_TE[:, None] @ gram_TEE @ change_TE[:, :, None]).flatten()
                error[sum(1 << expert for expert in subset)] = square_T.clamp(min=0).sum()
        return error

    def _weights_over(self, subset: tuple[int, ...]) -> Tensor:
        """Return float64 `[T, E]`: the weights of the experts `subset` where the gate has no others."""
        experts = torch.tensor(subset)
        bias = None if self._bias_E is None else self._bias_E[experts]
        place_TK, weight_TK, _ = choose(
            self._logits_TE[:, experts], self._router.top_k, bias_E=bias, renormalize=self._router.renormalize
        )
        weight_TE = torch.zeros(self._logits_TE.shape, dtype=torch.float64)
        return weight_TE.scatter_(1, experts[place_TK], weight_TK.double())


def _norms(rows_RD: Tensor) -> Tensor:
    """Return the L2 norm of each row, float64."""
    return torch.cat([chunk.double().norm(dim=1) for chunk in torch.split(rows_RD, _CHUNK)])


def _cosines(before_TD: Tensor, after_TD: Tensor) -> Tensor:
    """Return the cosine of each pair of rows, float64; 1, so that nothing turned, where one of them is zero."""
    parts = []
    for a, b in zip(torch.split(before_TD, _CHUNK), torch.split(after_TD, _CHUNK)):
        a, b = a.double(), b.double()
        product = a.norm(dim=1) * b.norm(dim=1)
        parts.append(torch.where(product > 0, (a * b).sum(1) / product, 1.0))
    return torch.cat(parts)
