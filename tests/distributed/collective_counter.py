"""Counts what torch.distributed is handed, at its dispatcher: whoever calls it, in forwards and backwards alike."""

from collections import Counter

import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

# The collective, and which argument holds the bytes that `parallel/traffic.py` counts. Any other one is an error.
COLLECTIVES = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::allgather_": ("all_gather", 0),
    "c10d::alltoall_base_": ("all_to_all", 1),
}


class CollectiveCounter(TorchDispatchMode):
    """Within it bytes are added up by axis of the mesh and collective; groups that are no axis are an error."""

    def __init__(self, mesh):
        super().__init__()
        wide = {name: axis for name, axis in vars(mesh).items() if axis.size > 1}
        self.axes = {axis.group.group_name: name for name, axis in wide.items()}
        assert len(self.axes) == len(wide), "two axes share a group"
        self.sent = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            kind, place = COLLECTIVES[func.name()]
            group = group_of(args)
            if group.size() > 1:  # DeepSpeed reduces over a group of one as well
                self.sent[self.axes[group.group_name], kind] += num_bytes(args[place])
        return func(*args, **(kwargs or {}))


def group_of(args):
    """The one argument that is a process group."""
    (group,) = [x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type())]
    return distributed.ProcessGroup.unbox(group)


def num_bytes(tensors):
    """Bytes of a tensor, or of tensors in nested lists."""
    return tensors.nbytes if isinstance(tensors, torch.Tensor) else sum(map(num_bytes, tensors))


def plain(traffic):
    """As plain data, without what is zero."""
    return {f"{axis} {kind}": size for (axis, kind), size in sorted(traffic.items()) if size}
