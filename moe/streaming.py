"""Runs a stored model with the weights of one layer in memory at a time, so that it may be larger than memory.

All batches pass a layer before the next one is read, and in a sparse layer one expert after the other. Of the experts
and embedding slots only those of the domains at hand are read.

Shape letters: B sequences, S positions, D model width, F expert hidden width, V vocabulary, R routed rows, E experts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..kernels.expert_mlp import expert_mlp
from .batch import Batch
from .canonical import canonical_views, is_parameter, slot_of
from .config import ModelConfig
from .domains import DomainRegistry
from .layer import Block, MoELayer
from .model import Transformer
from .routers import Router
from .routing import DomainGroup, Routing, RoutingContext


class Watcher(Protocol):
    """Sees what becomes of a batch in sparse layers; it changes nothing of what the batch leaves them with."""

    def route(self, gate: Router, x_BSD: Tensor, context: RoutingContext) -> Routing:
        """Return what `gate` says of the normed `x_BSD`, perhaps with further experts at weight 0 behind its own."""
        ...

    def see(self, before_BSD: Tensor, rows_RD: Tensor, receipt: object, after_BSD: Tensor) -> None:
        """Take note of the experts' outputs, as dispatched, and of the residual stream before and after them."""
        ...


class Weights(Protocol):
    """Where weights come from, by canonical name."""

    def read_into(self, name: str, target: Tensor) -> None:
        """Read one whole tensor into `target`, of its shape; other dtypes are converted."""
        ...


class RunnableModel(Protocol):
    """A model of which one tensor at a time can be had: stored, or cut from a stored one as it is read."""

    @property
    def config(self) -> ModelConfig:
        """Its config."""

    @property
    def registry(self) -> DomainRegistry:
        """Its domains."""

    @property
    def tensors(self) -> Weights:
        """Its weights."""


@dataclass(kw_only=True)
class Running:
    """A batch on its way through the layers."""

    x_BSD: Tensor
    start_BS: Tensor
    position_BS: Tensor
    groups: tuple[DomainGroup, ...]
    context: RoutingContext
    watcher: Watcher | None = None


class _Routed(NamedTuple):
    """A batch's rows in a sparse layer, grouped by expert; each expert's output takes the place of its rows."""

    rows_RD: Tensor
    count_E: Tensor
    begins: list[int]  # where each expert's rows begin
    receipt: object


class StreamedModel:
    """A stored model that runs layer by layer in fp32, for text of the given `domains` (ids; None: all).

    `rounding` rounds every parameter to that dtype first, as a copy of the model in that dtype has it.
    """

    def __init__(
        self, stored: RunnableModel, *, domains: Sequence[int] | None = None, rounding: torch.dtype | None = None
    ) -> None:
        self._tensors, self._rounding = stored.tensors, rounding
        with torch.device("meta"):
            self._model = Transformer(stored.config, stored.registry).requires_grad_(False).eval()
        chosen = stored.registry.domains if domains is None else [stored.registry.domains[id] for id in domains]
        self._domains = {domain.id for domain in chosen}
        self._slots = {domain.slot for domain in chosen}

    @torch.no_grad()
    def run_layers(self, batches: Sequence[Batch], on_layer: Callable[[], None] = lambda: None) -> list[Running]:
        """Take all batches through all layers together; their hidden states are held. `on_layer` hears of each layer.

        Raises ValueError for a batch of a domain whose weights are not read.
        """
        running = self.embed(batches)
        for layer in range(self._model.config.num_layers):
            self.run_layer(layer, running)
            on_layer()
        return running

    @torch.no_grad()
    def embed(self, batches: Sequence[Batch]) -> list[Running]:
        """Look the batches' tokens up. Raises ValueError for a batch of a domain whose weights are not read."""
        embedding = self._model.model.embed_tokens
        with self._loaded({"model.embed_tokens": embedding}):
            return [self._running(batch, None) for batch in batches]

    def resume(self, batch: Batch, x_BSD: Tensor) -> Running:
        """Return a batch whose hidden states were put aside before some layer."""
        return self._running(batch, x_BSD)

    @torch.no_grad()
    def run_layer(self, layer: int, running: Sequence[Running]) -> None:
        """Take batches through one layer."""
        block = self._model.model.layers[layer]
        assert isinstance(block, Block)
        if block.is_sparse:
            self._run_sparse(block, f"model.layers.{layer}", running)
        else:
            with self._loaded({f"model.layers.{layer}": block}):
                for batch in running:
                    batch.x_BSD, _ = block(batch.x_BSD, batch.start_BS, batch.position_BS, batch.context)

    @torch.no_grad()
    def run_head(self, running: Sequence[Running]) -> Iterator[Tensor]:
        """Yield fp32 `[B, S, V]` of what has passed the layers."""
        decoder, tied = self._model.model, self._model.config.tie_embeddings
        head = {"model.embed_tokens": decoder.embed_tokens} if tied else {"lm_head": self._model.lm_head}
        with self._loaded({"model.norm": decoder.norm, **head}):
            for batch in running:
                yield self._model.logits(decoder.norm(batch.x_BSD), batch.groups)

    def _running(self, batch: Batch, x_BSD: Tensor | None) -> Running:
        groups = self._model.groups(batch.domain_B)
        for group in groups:
            if group.domain not in self._domains:
                raise ValueError(f"domain id {group.domain} is not among those whose weights are read")
        length = batch.token_BS.shape[1]
        return Running(
            x_BSD=self._model.embed(batch.token_BS, groups) if x_BSD is None else x_BSD,
            start_BS=batch.start_BS,
            position_BS=torch.arange(length) - batch.start_BS,
            groups=groups,
            context=RoutingContext(
                token_BS=batch.token_BS,
                groups=groups,
                index_T=torch.arange(batch.token_BS.numel()),
                training=None,
            ),
        )

    def _run_sparse(self, block: Block, prefix: str, running: Sequence[Running]) -> None:
        """Do what the block does (`Block.forward`, `MoELayer.forward`), with one expert in memory at a time."""
        moe = block.block_sparse_moe
        parts: dict[str, nn.Module] = {
            f"{prefix}.input_layernorm": block.input_layernorm,
            f"{prefix}.self_attn": block.self_attn,
            f"{prefix}.post_attention_layernorm": block.post_attention_layernorm,
            f"{prefix}.block_sparse_moe.gate": moe.gate,
        }
        routed = []
        with self._loaded(parts):
            for batch in running:
                normed_BSD = block.input_layernorm(batch.x_BSD)
                batch.x_BSD = batch.x_BSD + block.self_attn(normed_BSD, batch.start_BS, batch.position_BS)
                routed.append(_route(moe, block.post_attention_layernorm(batch.x_BSD), batch))
        for expert in range(moe.gate.num_experts):
            self._run_expert(moe, f"{prefix}.block_sparse_moe.experts.{expert}", expert, routed)
        for batch, rows in zip(running, routed, strict=True):
            before_BSD = batch.x_BSD
            batch.x_BSD = before_BSD + moe.dispatcher.combine(rows.rows_RD, rows.receipt).view_as(before_BSD)
            if batch.watcher is not None:
                batch.watcher.see(before_BSD, rows.rows_RD, rows.receipt, batch.x_BSD)

    def _run_expert(self, moe: MoELayer, prefix: str, expert: int, routed: Sequence[_Routed]) -> None:
        wanting = [batch for batch in routed if batch.begins[expert] < batch.begins[expert + 1]]
        if not wanting:  # of another domain, or chosen by no token: not even read
            return
        _, width, dim = moe.experts.gate_up.shape
        gate_up_EGD, down_EDF = torch.empty(1, width, dim), torch.empty(1, dim, width // 2)
        self._read(f"{prefix}.w1.weight", gate_up_EGD[0, : width // 2])
        self._read(f"{prefix}.w3.weight", gate_up_EGD[0, width // 2 :])
        self._read(f"{prefix}.w2.weight", down_EDF[0])
        for batch in wanting:
            rows_RD = batch.rows_RD[batch.begins[expert] : batch.begins[expert + 1]]
            rows_RD.copy_(expert_mlp(rows_RD, batch.count_E[expert : expert + 1], gate_up_EGD, down_EDF))

    @contextmanager
    def _loaded(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Give modules on the meta device, by the prefix of their canonical names, their weights for a while."""
        for prefix, module in modules.items():
            module.to_empty(device="cpu")
            for name, tensor in module.state_dict().items():
                for canonical, view in canonical_views(f"{prefix}.{name}", tensor):
                    if slot_of(canonical) is None or slot_of(canonical) in self._slots:
                        self._read(canonical, view)
        try:
            yield
        finally:
            for module in modules.values():
                module.to_empty(device="meta")

    def _read(self, name: str, target: Tensor) -> None:
        """Read a tensor into `target`, rounded."""
        self._tensors.read_into(name, target)
        if self._rounding is not None and is_parameter(name):
            target.copy_(target.to(self._rounding))


def _route(moe: MoELayer, normed_BSD: Tensor, batch: Running) -> _Routed:
    gate, watcher = moe.gate, batch.watcher
    routing = gate(normed_BSD, batch.context) if watcher is None else watcher.route(gate, normed_BSD, batch.context)
    rows_RD, count_E, receipt = moe.dispatcher.dispatch(normed_BSD.flatten(0, 1), routing)
    return _Routed(rows_RD, count_E, [0, *count_E.cumsum(0).tolist()], receipt)
