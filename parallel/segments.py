"""Runs of canonical tensors inside a flat interval of memory, and AdamW over them.

ZeRO gives every process an interval of its parameters laid end to end. Every canonical tensor (an expert of a stack,
the gate or up half of a product, the real rows of a padded vocabulary) is contiguous in memory; so what an interval
holds of it is a run, and state, norm, freezing, saving and loading go by canonical name.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adamw import MOMENTS, build_adamw
from .engine import OptimizerConfig, TensorSource
from .mesh import Mesh
from .pieces import Piece
from .shards import Shard, Sharding


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Elements `begin` to `end` of a flattened shard; they lie from `offset` on in the interval."""

    shard: Shard
    begin: int
    end: int
    offset: int
    counted: bool  # of all processes that hold the shard this one counts it, in a norm or a file

    def of(self, flat: Tensor) -> Tensor:
        """Return the segment's part of anything of the interval's size."""
        return flat.narrow(0, self.offset, self.end - self.begin)

    def piece(self, tensor: Tensor) -> Piece:
        """Describe `tensor`, of the segment's size."""
        shard = self.shard
        return Piece(
            name=shard.name, shape=shard.shape, dim=shard.dim, start=shard.start, stop=shard.stop,
            begin=self.begin, end=self.end, tensor=tensor,
        )  # fmt: skip


def find_segments(
    parameters: Iterable[tuple[str, Tensor]], sharding: Sharding, mesh: Mesh, first: int, last: int
) -> tuple[Segment, ...]:
    """Return what elements `first` to `last` hold of named in-memory parameters that are laid end to end."""
    found: list[Segment] = []
    base = 0
    for name, parameter in parameters:
        for shard in sharding.views(name, torch.empty(parameter.shape, device="meta")):
            assert shard.tensor.is_contiguous(), f"{shard.name} is no run of {name}"
            begin = base + int(shard.tensor.storage_offset())
            low, high = max(begin, first), min(begin + shard.tensor.numel(), last)
            if low < high:
                counted, begin, end = shard.counted(mesh), low - begin, high - begin
                found.append(Segment(shard=shard, begin=begin, end=end, offset=low - first, counted=counted))
        base += parameter.numel()
    return tuple(found)


class Interval:
    """A flat fp32 master and the segments in it. `replicas` processes hold the same, this one as number `rank`."""

    def __init__(self, master: Tensor, segments: tuple[Segment, ...], *, rank: int = 0) -> None:
        self.master, self.segments, self.is_first = master.detach(), segments, rank == 0

    def counts(self, segment: Segment) -> bool:
        """Whether this process counts the segment."""
        return segment.counted and self.is_first


class SegmentAdamW:
    """AdamW over all segments of some intervals."""

    def __init__(self, intervals: Sequence[Interval], config: OptimizerConfig) -> None:
        self.intervals, self.config = intervals, config
        self.masters = [[segment.of(interval.master) for segment in interval.segments] for interval in intervals]
        entries = list(self.entries())
        self.optimizer = build_adamw(
            (master for _, segment, master in entries if len(segment.shard.shape) > 1),
            (master for _, segment, master in entries if len(segment.shard.shape) <= 1),
            config,
        )

    def entries(self) -> Iterator[tuple[Interval, Segment, Tensor]]:
        """Yield every segment with its master."""
        for interval, masters in zip(self.intervals, self.masters):
            for segment, master in zip(interval.segments, masters):
                yield interval, segment, master

    def square_sum(self, gradients: Sequence[Tensor], trains: Callable[[str], bool]) -> Tensor:
        """Return the sum of squares of what trains and this process counts, fp64, in host memory.

        `gradients` are one flat an interval.
        """
        total = torch.zeros((), dtype=torch.float64)
        for interval, gradient in zip(self.intervals, gradients):
            counted = [s.of(gradient) for s in interval.segments if interval.counts(s) and trains(s.shard.name)]
            if counted:
                total += torch.stack(torch._foreach_norm(counted)).double().square().sum().cpu()
        return total

    def update(self, gradients: Sequence[Tensor], lr: float, scale: float, trains: Callable[[str], bool]) -> None:
        """Move what trains by its gradient times `scale`; the rest stands, moments and step too.

        `gradients` are overwritten.
        """
        for interval, masters, gradient in zip(self.intervals, self.masters, gradients):
            if scale != 1.0:
                gradient.mul_(scale)
            for segment, master in zip(interval.segments, masters):
                master.grad = segment.of(gradient) if trains(segment.shard.name) else None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def held_masters(self) -> Iterator[Piece]:
        """Yield the masters that this process counts."""
        for interval, segment, master in self.entries():
            if interval.counts(segment):
                yield segment.piece(master)

    def held_moments(self) -> Iterator[Piece]:
        """Yield the moments that this process counts, and the steps of the tensors whose first element it has."""
        for interval, segment, master in self.entries():
            if not interval.counts(segment):
                continue
            state = self.optimizer.state[master]
            for moment in ("exp_avg", "exp_avg_sq"):
                piece = segment.piece(state[moment])
                yield _renamed(piece, f"{segment.shard.name}.{moment}")
            if segment.begin == 0 and segment.shard.start == 0:
                yield Piece(
                    name=f"{segment.shard.name}.step", shape=(), dim=None, start=0, stop=0, begin=0, end=1,
                    tensor=state["step"].view(1),
                )  # fmt: skip

    @torch.no_grad()
    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Copy masters from shards by canonical name."""
        for _, segment, master in self.entries():
            master.copy_(values[segment.shard.name].flatten()[segment.begin : segment.end])

    @torch.no_grad()
    def load(self, model: TensorSource, optimizer: TensorSource | None) -> None:
        """Read masters, moments and steps, each exactly what is held here; without `optimizer` moments are zero."""
        for _, segment, master in self.entries():
            master.copy_(read_segment(model, segment, segment.shard.name))
            state = self.optimizer.state[master]
            for moment in MOMENTS:
                name = f"{segment.shard.name}.{moment}"
                if optimizer is None:
                    state[moment].zero_()
                elif moment == "step":
                    state[moment].copy_(optimizer.read_slice(name, ()))
                else:
                    state[moment].copy_(read_segment(optimizer, segment, name))


def read_segment(source: TensorSource, segment: Segment, name: str) -> Tensor:
    """Read a segment's elements, and beyond them no more than to the ends of the first and last row of its shard."""
    slices, shard = list(segment.shard.slices), segment.shard
    if not slices:
        return source.read_slice(name, ()).flatten()
    row = math.prod(s.stop - s.start for s in slices[1:])
    first, last = segment.begin // row, -(-segment.end // row)
    slices[0] = slice(slices[0].start + first, slices[0].start + last)
    assert slices[0].stop <= (shard.stop if shard.dim == 0 else shard.shape[0])
    return source.read_slice(name, slices).flatten()[segment.begin - first * row : segment.end - first * row]


def _renamed(piece: Piece, name: str) -> Piece:
    return Piece(**{**vars(piece), "name": name})
