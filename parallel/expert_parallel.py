"""Expert parallelism: rows travel to the ranks that hold their experts, and back.

With etp = tp every tensor rank carries all its tokens and has a part of each expert, whose results are added up. With
etp = 1 under tp > 1 experts are whole, and each tensor rank carries its share of the tokens.

Shape letters: B sequences, S positions, T tokens, D model width, E experts, K top-k, R rows, P expert ranks, L the
most experts of a rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.backend import TORCH, Backends
from ..kernels.permute import combine, permute
from ..kernels.positions import Positions, positions
from ..moe.layer import MoELayer
from ..moe.model import Transformer
from ..moe.routing import Routing
from .collectives import exchange_counts, exchange_rows, gather_rows, reorder, scatter_rows
from .megatron import copy, reduce
from .mesh import Mesh
from .shards import Sharding


def apply_expert_parallel(model: Transformer, mesh: Mesh, sharding: Sharding) -> None:
    """Give every sparse layer (whose experts are spread already) a dispatcher that spans processes."""
    if mesh.ep.size == mesh.tp.size == 1:
        return
    for module in model.modules():
        if isinstance(module, MoELayer):
            placement = sharding.placement[module.layer]
            module.dispatcher = AllToAllDispatcher(mesh, placement, module.backends)  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class AllToAllReceipt:
    """How rows went out, so that they find back."""

    positions: Positions  # of the tokens that this rank carries, sorted by (rank, expert)
    weight_TK: Tensor
    sent: list[int]  # rows, by destination
    received: list[int]  # rows, by source
    source_R: Tensor  # received row of each row that the experts get
    inverse_R: Tensor
    num_tokens: int
    dropped: Tensor


class AllToAllDispatcher:
    """See `moe.dispatch.Dispatcher`. Rows of an expert come by source rank, then in token order."""

    def __init__(self, mesh: Mesh, placement: tuple[tuple[int, ...], ...], backends: Backends = TORCH) -> None:
        self.mesh, self.backends = mesh, backends
        self.shares_tokens = mesh.tp.size > 1 and mesh.etp.size == 1
        self.sizes = [len(experts) for experts in placement]
        # Experts of a rank become neighbours: place_E[e] is expert e's position in the order of the ranks.
        self.place_E = torch.tensor([expert for experts in placement for expert in experts]).argsort()

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, AllToAllReceipt]:
        """Sort by rank and expert, tell everyone how many rows come, send them; see `Dispatcher`."""
        place_BSK = self.place_E.to(x_TD.device)[routing.expert_BSK]
        # Capacity is a matter of whole sequences, so it is settled before tokens are shared out.
        order = positions(
            place_BSK, routing.num_experts, capacity_B=routing.capacity_B, backend=self.backends.positions
        )
        dropped = (order.row_TK < 0).sum()
        weight_TK, num_tokens = routing.weight_BSK.flatten(0, 1), x_TD.shape[0]
        if self.shares_tokens:
            order = self._own(order)
            x_TD, weight_TK = (scatter_rows(self._padded(tensor), self.mesh.tp) for tensor in (x_TD, weight_TK))
        else:
            x_TD, weight_TK = copy(x_TD, self.mesh.etp), copy(weight_TK, self.mesh.etp)
        rows_RD = permute(x_TD, order, weight_TK.shape[1], backend=self.backends.permute)
        sent_PL = self._by_rank(order.count_E)
        received_PL = exchange_counts(sent_PL, self.mesh.ep)
        sent, received = sent_PL.sum(1).tolist(), received_PL.sum(1).tolist()
        rows_RD = exchange_rows(rows_RD, sent, received, self.mesh.ep)
        source_R = _by_expert(received_PL)
        receipt = AllToAllReceipt(
            positions=order,
            weight_TK=weight_TK,
            sent=sent,
            received=received,
            source_R=source_R,
            inverse_R=source_R.argsort(),
            num_tokens=num_tokens,
            dropped=dropped,
        )
        count_E = received_PL.sum(0)[: self.sizes[self.mesh.ep.rank]]
        return reorder(rows_RD, source_R, receipt.inverse_R), count_E, receipt

    def combine(self, rows_RD: Tensor, receipt: AllToAllReceipt) -> Tensor:
        """Send results back to where the rows came from; weigh and add them up; see `Dispatcher`."""
        rows_RD = reorder(rows_RD, receipt.inverse_R, receipt.source_R)
        rows_RD = exchange_rows(rows_RD, receipt.received, receipt.sent, self.mesh.ep)
        out_TD = combine(rows_RD, receipt.weight_TK, receipt.positions, backend=self.backends.permute)
        if self.shares_tokens:
            return gather_rows(out_TD, self.mesh.tp)[: receipt.num_tokens]
        return reduce(out_TD, self.mesh.etp)

    def dropped(self, receipt: AllToAllReceipt) -> Tensor:
        """Count the pairs without a row, of all the tokens."""
        return receipt.dropped

    def _padded(self, x_TD: Tensor) -> Tensor:
        """Add rows that nothing is routed for, so that tensor ranks get equal shares."""
        return functional.pad(x_TD, (0, 0, 0, -x_TD.shape[0] % self.mesh.tp.size))

    def _own(self, order: Positions) -> Positions:
        """Keep the pairs of this tensor rank's share of the tokens."""
        K = order.row_TK.shape[1]
        num_tokens = -(-order.row_TK.shape[0] // self.mesh.tp.size)
        first = self.mesh.tp.rank * num_tokens * K
        all_R = order.source_R
        kept_R = (all_R >= first) & (all_R < first + num_tokens * K)
        source_R = all_R[kept_R] - first
        row_N = torch.full((num_tokens * K,), -1, device=source_R.device)
        row_N[source_R] = torch.arange(source_R.numel(), device=source_R.device)
        place_R = torch.arange(order.count_E.numel(), device=source_R.device).repeat_interleave(order.count_E)
        count_E = torch.bincount(place_R[kept_R], minlength=order.count_E.numel())
        return Positions(row_N.view(num_tokens, K), source_R, count_E)

    def _by_rank(self, count_E: Tensor) -> Tensor:
        """`[P, L]`: each rank's experts in a row, zeros after them."""
        parts = torch.split(count_E, self.sizes)
        return torch.stack([functional.pad(part, (0, max(self.sizes) - part.numel())) for part in parts])


def _by_expert(received_PL: Tensor) -> Tensor:
    """Order rows that came by (source, expert) by (expert, source); inside a block they keep their order."""
    length_LP = received_PL.t().flatten()
    start_PL = received_PL.flatten().cumsum(0).view_as(received_PL) - received_PL
    start_LP = start_PL.t().flatten()
    target_LP = length_LP.cumsum(0) - length_LP
    row_R = torch.arange(int(length_LP.sum()), device=received_PL.device)
    return row_R + (start_LP - target_LP).repeat_interleave(length_LP)
