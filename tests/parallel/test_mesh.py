"""The group of what talks beside training: it waits longer than training does."""

from datetime import timedelta

import torch
from torch import distributed

from sigmoe.parallel.mesh import Axis, background_axis


def test_beside_training_a_rank_may_take_longer_than_a_collective_in_training():
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=5))
    try:
        # One process is a group too; that it says it is one of two only has it make one.
        beside = background_axis(Axis(group=distributed.group.WORLD, rank=0, size=2), 5.0)
        assert beside.group is not None and beside.group is not distributed.group.WORLD
        assert beside.group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=15)
    finally:
        distributed.destroy_process_group()
