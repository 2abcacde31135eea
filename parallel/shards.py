"""What each process holds of every canonical tensor, so that any code can read, write or save by canonical name.

`CUTS` is the one table of how parameters are cut; `tensor_parallel.py` puts the mappings around them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..moe.canonical import canonical_views
from ..moe.config import ModelConfig
from ..moe.domains import DomainRegistry
from ..moe.model import Transformer
from .layout import place_experts
from .mesh import Axis, Mesh


@dataclass(frozen=True)
class Cut:
    """A parameter's dimension, counted from the last, is cut over an axis."""

    axis: str  # tp or etp
    dim: int


COLUMN, ROW = Cut("tp", -2), Cut("tp", -1)  # rows of the weight are columns of the product
EXPERT_COLUMN, EXPERT_ROW = Cut("etp", -2), Cut("etp", -1)

# The in-memory name's end -> how it is cut. gate_up is cut in each half, gate and up. What is not here is replicated:
# norms, routers' gates, biases and tables, QK-norm by head.
CUTS: dict[str, Cut] = {
    r"(embed_tokens|lm_head)(\.slots\.\d+)?\.weight": COLUMN,  # the vocabulary, padded to what divides
    r"self_attn\.[qkv]_proj\.weight": COLUMN,
    r"self_attn\.o_proj\.weight": ROW,
    r"mlp\.gate_up": COLUMN,
    r"mlp\.down": ROW,
    r"experts\.gate_up": EXPERT_COLUMN,
    r"experts\.down": EXPERT_ROW,
}
WIDTH_CUTS: dict[str, Cut] = {r"self_attn\.[qk]_norm\.weight": ROW}  # QK-norm over the whole width


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The part of a canonical tensor that is here: rows `start` to `stop` of dimension `dim`."""

    name: str  # canonical
    tensor: Tensor  # a view of the in-memory tensor: its real part, without padding
    shape: tuple[int, ...]  # of the whole canonical tensor
    dim: int | None  # None: all of it is here
    start: int
    stop: int
    data_axis: str  # "dp" or "edp": its members hold the same view, and their gradients are to be summed
    replicated: bool  # whether all of tp hold the same as well, gradients included, which are complete and equal

    def part(self, whole: Tensor) -> Tensor:
        """Return the view of a whole tensor that is here."""
        return whole if self.dim is None else whole.narrow(self.dim, self.start, self.stop - self.start)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The part, as an index into the whole tensor."""
        return tuple(
            slice(self.start, self.stop) if dim == self.dim else slice(0, size) for dim, size in enumerate(self.shape)
        )

    def counted(self, mesh: Mesh) -> bool:
        """Whether this process is the one of its tp axis that counts this piece, in a norm or a file."""
        return not self.replicated or mesh.tp.rank == 0

    def first(self, mesh: Mesh) -> bool:
        """Whether this process is the first of all that hold this piece."""
        axis = mesh.dp if self.data_axis == "dp" else mesh.edp
        return axis.rank == 0 and self.counted(mesh)


class Sharding:
    """Knows, for a model on a mesh, the part of every parameter that is here."""

    def __init__(self, config: ModelConfig, registry: DomainRegistry, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.placement = {
            layer: place_experts(registry.sets(index), mesh.ep.size)
            for index, layer in enumerate(config.sparse_layer_ids)
        }
        cuts = CUTS | (WIDTH_CUTS if config.qk_norm == "width" else {})
        self._cuts = [(re.compile(rf"(^|\.){pattern}$"), cut) for pattern, cut in cuts.items()]

    def cut(self, name: str) -> tuple[int, Axis] | None:
        """Return the dimension (counted from the last) and the axis that an in-memory parameter is cut over."""
        for pattern, cut in self._cuts:
            if pattern.search(name):
                axis = self.mesh.tp if cut.axis == "tp" else self.mesh.etp
                return (cut.dim, axis) if axis.size > 1 else None
        return None

    def experts(self, name: str) -> tuple[int, ...] | None:
        """Return the ids of the experts here, in order, where an in-memory parameter is a stack of them."""
        match = re.search(r"layers\.(\d+)\.block_sparse_moe\.experts\.", name)
        return self.placement[int(match[1])][self.mesh.ep.rank] if match else None

    def local_shape(self, name: str, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape here of an in-memory parameter that is `whole` in one process."""
        shape, experts, cut = list(whole), self.experts(name), self.cut(name)
        if experts is not None:
            shape[0] = len(experts)
        if cut is not None:
            dim, axis = cut
            shape[dim] = -(-shape[dim] // axis.size)
        return tuple(shape)

    def views(self, name: str, tensor: Tensor) -> Iterator[Shard]:
        """Yield the shards behind the in-memory parameter `name`; `tensor` is it or anything of its local shape."""
        experts, cut = self.experts(name), self.cut(name)
        for canonical, view in canonical_views(name, tensor, experts):
            yield self._shard(canonical, view, cut, is_expert=experts is not None)

    def all(self, model: nn.Module) -> dict[str, Shard]:
        """Return what is here of every parameter and persistent buffer, by canonical name."""
        shards: dict[str, Shard] = {}
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=False).items():
                shards.update({shard.name: shard for shard in self.views(name, tensor)})
        return shards

    def _shard(self, name: str, view: Tensor, cut: tuple[int, Axis] | None, *, is_expert: bool) -> Shard:
        shape, data_axis = list(view.shape), "edp" if is_expert else "dp"
        if cut is None:
            stop = shape[0] if shape else 0
            return Shard(
                name=name, tensor=view, shape=tuple(shape), dim=None, start=0, stop=stop, data_axis=data_axis,
                replicated=not is_expert and self.mesh.tp.size > 1,
            )  # fmt: skip
        dim, axis = cut[0] % view.dim(), cut[1]
        is_vocabulary = name.startswith(("model.embed_tokens.", "lm_head."))
        whole = self.config.vocab_size if is_vocabulary else shape[dim] * axis.size
        start = min(axis.rank * shape[dim], whole)
        stop = min(start + shape[dim], whole)
        shape[dim] = whole
        return Shard(
            name=name, tensor=view.narrow(dim, 0, stop - start), shape=tuple(shape), dim=dim, start=start, stop=stop,
            data_axis=data_axis, replicated=False,
        )  # fmt: skip


def shards(model: Transformer, mesh: Mesh) -> dict[str, Shard]:
    """Return what this process holds of every canonical tensor of a parallelised model."""
    return Sharding(model.config, model.registry, mesh).all(model)
