"""The processes of a run, by axis. Everything that communicates is handed the mesh, or one of its axes.

The dense part of the model lies on dp x tp, the experts on edp x ep x etp: the same processes, cut in two ways.
"""

from dataclasses import dataclass, replace
from datetime import timedelta

from torch import distributed
from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The processes that differ from this one in one coordinate. `group` is None without torch.distributed."""

    group: ProcessGroup | None
    rank: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This process's axes."""

    world: Axis
    dp: Axis  # hold the same dense parameters, see other samples
    tp: Axis  # hold other parts of the dense parameters, see the same samples
    ep: Axis  # hold other experts
    etp: Axis  # hold other parts of the same experts: the tp axis, or this process alone
    edp: Axis  # hold the same parts of the same experts


def single_mesh() -> Mesh:
    """One process, without torch.distributed."""
    alone = Axis(group=None, rank=0, size=1)
    return Mesh(world=alone, dp=alone, tp=alone, ep=alone, etp=alone, edp=alone)


# A rank's disk may take so many times as long as a collective in training may.
_PATIENCE = 3


def background_axis(world: Axis, timeout: float) -> Axis:
    """Return all processes in a gloo group of their own, for what talks beside training. All call it.

    Nobody waits there longer than three times `timeout` seconds, what a collective in training may take: one rank's
    disk may be slow. A rank that dies is known at once all the same.
    """
    if world.size == 1:
        return world
    return replace(world, group=distributed.new_group(backend="gloo", timeout=timedelta(seconds=_PATIENCE * timeout)))
