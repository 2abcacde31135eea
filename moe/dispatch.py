"""Tokens to experts and back: the one seam where expert parallelism enters.

Shape letters: B sequences, S positions, T tokens (B*S), D model width, E experts, K top-k, R routed rows.
"""

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from ..kernels.backend import TORCH, Backends
from ..kernels.permute import combine, permute
from ..kernels.positions import Positions, positions
from .routing import Routing

ReceiptT = TypeVar("ReceiptT")


class Dispatcher(Protocol, Generic[ReceiptT]):
    """Brings rows to the experts of this process, grouped by expert, and their results back to the tokens."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, ReceiptT]:
        """Return `rows_RD` grouped by expert, `count_E` (rows of each expert), and the receipt that `combine` wants."""
        ...

    def combine(self, rows_RD: Tensor, receipt: ReceiptT) -> Tensor:
        """Return `x_TD`: each token's rows, weighted and summed."""
        ...

    def dropped(self, receipt: ReceiptT) -> Tensor:
        """Return how many routed pairs capacity dropped (int64 scalar)."""
        ...


@dataclass(frozen=True)
class LocalReceipt:
    """How the tokens were sorted, and their weights."""

    positions: Positions
    weight_TK: Tensor


class LocalDispatcher:
    """All experts are here: a sort."""

    def __init__(self, backends: Backends = TORCH) -> None:
        self.backends = backends

    def sort(self, routing: Routing) -> LocalReceipt:
        """Sort the tokens by expert, stably."""
        sorted_by_expert = positions(
            routing.expert_BSK, routing.num_experts, capacity_B=routing.capacity_B, backend=self.backends.positions
        )
        return LocalReceipt(sorted_by_expert, routing.weight_BSK.flatten(0, 1))

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, LocalReceipt]:
        """Bring the tokens into their order by expert; see `Dispatcher`."""
        receipt = self.sort(routing)
        order, top_k = receipt.positions, receipt.weight_TK.shape[1]
        return permute(x_TD, order, top_k, backend=self.backends.permute), order.count_E, receipt

    def combine(self, rows_RD: Tensor, receipt: LocalReceipt) -> Tensor:
        """Gather each token's rows; see `Dispatcher`."""
        return combine(rows_RD, receipt.weight_TK, receipt.positions, backend=self.backends.permute)

    def dropped(self, receipt: LocalReceipt) -> Tensor:
        """Count the pairs without a row."""
        return (receipt.positions.row_TK < 0).sum()
