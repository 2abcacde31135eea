"""What the attention benchmark computes: forms of visibility and heads, their inputs, flops and bytes.

Shape letters: B sequences, S positions, H query heads, G kv heads, C head width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["causal", "documents", "window", "gqa", "mqa"]


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One pass. causal: one document a sequence; documents: of 1 to a quarter of its tokens; gqa: 8 heads a group."""

    form: Form
    length: int
    tokens: int  # of all sequences
    heads: int
    width: int  # of a head
    window: int  # of the form window

    def __post_init__(self) -> None:
        for name in ("length", "tokens", "heads", "width", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tokens % self.length:
            raise ValueError(f"length must divide tokens ({self.tokens}), got {self.length}")
        if self.form == "gqa" and self.heads % 8:
            raise ValueError(f"heads must be a multiple of 8 for the form gqa, got {self.heads}")

    @property
    def kv_heads(self) -> int:
        """Of the form."""
        return {"gqa": self.heads // 8, "mqa": 1}.get(self.form, self.heads)

    @property
    def visible(self) -> int | None:
        """The window, where the form has one."""
        return self.window if self.form == "window" else None

    def start(self) -> Tensor:
        """Return where each token's document begins, int64 [B, S]."""
        B, S = self.tokens // self.length, self.length
        start_BS = torch.zeros(B, S, dtype=torch.int64)
        if self.form != "documents":
            return start_BS
        generator = torch.Generator().manual_seed(0)
        for row in start_BS:
            begin = 0
            while begin < S:
                row[begin:] = begin
                begin += int(torch.randint(1, max(S // 4, 1) + 1, (1,), generator=generator))
        return start_BS

    def pairs(self) -> int:
        """Return how many pairs of query and key see each other, of one head."""
        i = torch.arange(self.length)
        seen_BS = self.start() if self.visible is None else self.start().maximum(i - self.visible + 1)
        return int((i + 1 - seen_BS).sum())

    def tile_pairs(self, block_M: int, block_N: int, *, together: bool) -> int:
        """Return the pairs in the tiles of queries and keys that are visited; `together`: the same in all sequences."""
        i = torch.arange(self.length)
        seen_BS = self.start() if self.visible is None else self.start().maximum(i - self.visible + 1)
        total = 0
        for first in range(0, self.length, block_M):
            end = min(first + block_M, self.length)
            begin_B = seen_BS[:, first:end].amin(1) // block_N
            if together:
                begin_B = begin_B.amin().expand_as(begin_B)
            total += int((-(-end // block_N) - begin_B).sum()) * block_N * (end - first)
        return total

    def flops(self) -> tuple[int, int]:
        """Of a forward, 4 H C pairs, and of a backward, two and a half times as many."""
        forward = 4 * self.heads * self.width * self.pairs()
        return forward, forward * 5 // 2

    def moved_bytes(self, size: int) -> tuple[int, int]:
        """Bytes that must be read and written, numbers of `size` bytes: q, k, v, output; and their gradients too."""
        T, C = self.tokens, self.width
        forward = 2 * size * T * C * (self.heads + self.kv_heads) + 4 * T * self.heads
        return forward, 2 * forward


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What every contender is given."""

    q_BSHC: Tensor
    k_BSGC: Tensor
    v_BSGC: Tensor
    start_BS: Tensor
    window: int | None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Those that want gradients."""
        return self.q_BSHC, self.k_BSGC, self.v_BSGC


def draw(case: AttentionCase, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Return random inputs, the same in every process on this device."""
    generator = torch.Generator(device).manual_seed(0)
    B, S = case.tokens // case.length, case.length

    def normal(heads: int) -> Tensor:
        shape = (B, S, heads, case.width)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()

    q, k, v = normal(case.heads), normal(case.kv_heads), normal(case.kv_heads)
    return Inputs(q_BSHC=q, k_BSGC=k, v_BSGC=v, start_BS=case.start().to(device), window=case.visible)
