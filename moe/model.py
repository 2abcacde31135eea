"""The language model on one device.

Shape letters: B sequences, S positions, T tokens (B*S), D model width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.backend import TORCH, Backends
from ..kernels.linear import linear_forward, packed
from .attention import SelfAttention
from .cache import CacheStep, KeyValueCache
from .config import ModelConfig, check_registry
from .domains import DomainRegistry
from .experts import DenseFFN, GroupedExperts
from .layer import Block, RMSNorm
from .routing import DomainGroup, RoutingContext, RoutingStats, TrainingPass, group_by_domain, merge_groups
from .vocabulary import LocalVocabulary, Vocabulary


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """Logits, or with labels the losses; and what every sparse layer counted."""

    logits_BSV: Tensor | None
    loss_sum: Tensor | None  # fp32 scalar, differentiable: summed over labelled tokens
    loss_BS: Tensor | None  # fp32, detached: each token's loss, 0 where it has no label
    stats: tuple[RoutingStats, ...]


class Slots(nn.Module):
    """Embedding or head weights `[V, D]`: one, or one a slot."""

    def __init__(self, num_slots: int, vocab_size: int, dim: int) -> None:
        super().__init__()
        if num_slots == 1:
            self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        else:
            self.slots = nn.ModuleList(Slots(1, vocab_size, dim) for _ in range(num_slots))

    def of(self, slot: int) -> Tensor:
        """Return a slot's weight."""
        weight = (self.slots[slot] if hasattr(self, "slots") else self).weight
        assert isinstance(weight, Tensor)
        return weight

    def pack(self) -> None:
        """Make the weights of a head good for inference alone, and faster there."""
        for module in self.slots if hasattr(self, "slots") else (self,):
            weight = module.weight
            assert isinstance(weight, Tensor)
            del module.weight
            module.weight = packed(weight)


class Decoder(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: ModelConfig, registry: DomainRegistry, backends: Backends = TORCH) -> None:
        super().__init__()
        self.embed_tokens = Slots(config.num_slots, config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, registry, layer, backends) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps, backends.norm)

    def forward(
        self, x_BSD: Tensor, start_BS: Tensor, context: RoutingContext
    ) -> tuple[Tensor, tuple[RoutingStats, ...]]:
        """Return the normed hidden states and the sparse layers' stats."""
        position_BS = torch.arange(x_BSD.shape[1], device=x_BSD.device) - start_BS
        stats = []
        for layer in self.layers:
            x_BSD, layer_stats = layer(x_BSD, start_BS, position_BS, context)
            if layer_stats is not None:
                stats.append(layer_stats)
        return self.norm(x_BSD), tuple(stats)

    def extend(self, x_BSD: Tensor, step: CacheStep, context: RoutingContext, cache: KeyValueCache) -> Tensor:
        """Return the normed hidden states of tokens that follow those in `cache`."""
        for layer in self.layers:
            assert isinstance(layer, Block)
            x_BSD = layer.extend(x_BSD, step, context, cache)
        out_BSD: Tensor = self.norm(x_BSD)
        return out_BSD


class Transformer(nn.Module):
    """Decoder-only language model with dense and sparse layers.

    Weights are empty after construction: `initialize` draws them, or a checkpoint fills them. `vocabulary` may be
    replaced by one that spans processes. `backends` says which implementations run; in generation, of norms and
    attention alone.
    """

    def __init__(self, config: ModelConfig, registry: DomainRegistry, backends: Backends = TORCH) -> None:
        super().__init__()
        check_registry(config, registry)
        self.config, self.registry = config, registry
        self.model = Decoder(config, registry, backends)
        self.vocabulary: Vocabulary = LocalVocabulary(backends.linear_cross_entropy)
        if not config.tie_embeddings:
            self.lm_head = Slots(config.num_slots, config.vocab_size, config.dim)

    def forward(
        self,
        token_BS: Tensor,
        *,
        start_BS: Tensor | None = None,
        domain_B: Tensor | None = None,
        sample_B: Tensor | None = None,
        label_BS: Tensor | None = None,
        training: TrainingPass | None = None,
    ) -> ModelOutput:
        """Run the model on packed sequences.

        Args:
            token_BS: int64 token ids.
            start_BS: int64 first position of each token's document; None: one document a sequence.
            domain_B: int64 domain ids; needed by domain routers and embedding slots.
            sample_B: int64 global sample index, the key of a training pass's random draws; None: 0, 1, ...
            label_BS: int64 next tokens, -100 ignored; with them the losses are returned instead of logits.
            training: makes this a training pass (capacity, jitter, balance losses).

        Raises:
            ValueError: a domain-routed model without `domain_B`, or ids that the registry does not know.
        """
        groups = self.groups(domain_B)
        batch, length = token_BS.shape
        if sample_B is None:
            sample_B = torch.arange(batch, device=token_BS.device)
        index_T = (sample_B.unsqueeze(1) * length + torch.arange(length, device=token_BS.device)).flatten()
        context = RoutingContext(token_BS=token_BS, groups=groups, index_T=index_T, training=training)
        if start_BS is None:
            start_BS = torch.zeros_like(token_BS)
        x_BSD, stats = self.model(self.embed(token_BS, groups), start_BS, context)
        if label_BS is None:
            return ModelOutput(logits_BSV=self.logits(x_BSD, groups), loss_sum=None, loss_BS=None, stats=stats)
        losses = [
            self.vocabulary.cross_entropy(group.of(x_BSD).flatten(0, 1), weight, group.of(label_BS).flatten())
            for group, weight in self._heads(groups)
        ]
        loss_BS = self._merge(groups, [loss_T.view(-1, length) for _, loss_T in losses])
        loss_sum = torch.stack([loss for loss, _ in losses]).sum()
        return ModelOutput(logits_BSV=None, loss_sum=loss_sum, loss_BS=loss_BS, stats=stats)

    def groups(self, domain_B: Tensor | None) -> tuple[DomainGroup, ...]:
        """Return the batch's sequences by domain; ValueError where the model needs domains, or knows no such id."""
        if domain_B is None and self.config.computes_by_domain:
            raise ValueError(f"this model routes by domain: give domain=, one of {', '.join(self.registry.names)}")
        groups = group_by_domain(domain_B)
        for group in groups:
            if not 0 <= group.domain < len(self.registry.domains):
                raise ValueError(f"domain id {group.domain} is not one of this model's {len(self.registry.domains)}")
        return groups

    def pack(self) -> None:
        """Make the weights good for `extend` alone, where they are read faster; they can be neither trained nor saved.

        A tied embedding stays as it is. On a device or in a dtype that knows no packing nothing becomes faster. A
        packed model stays as it is.
        """
        if any(isinstance(module, SelfAttention) and module.qkv is not None for module in self.modules()):
            return
        for module in self.modules():
            if isinstance(module, SelfAttention | GroupedExperts | DenseFFN):
                module.pack()
        if not self.config.tie_embeddings:
            self.lm_head.pack()

    @torch.no_grad()
    def extend(
        self,
        token_BS: Tensor,
        cache: KeyValueCache,
        *,
        start_BS: Tensor | None = None,
        domain_B: Tensor | None = None,
    ) -> Tensor:
        """Run the model on tokens that follow those in `cache`, and add them to it; no gradients, nothing counted.

        Args:
            token_BS: int64 token ids; into an empty cache a prompt, afterwards a few at a time.
            cache: of this model's config, one sequence a row.
            start_BS: int64 first position of each token's document, counted from the first token in the cache. Tokens
                before it are out of sight: so prompts of different lengths are padded on the left. None: the document
                that stands in the cache goes on.
            domain_B: as for `forward`.

        Returns:
            The last tokens' logits `[B, V]`.

        Raises:
            ValueError: as `forward`.
        """
        groups = self.groups(domain_B)
        cache.reserve(token_BS.shape[1])
        step = cache.step(token_BS.shape[1], start_BS)
        index_T = torch.arange(token_BS.numel(), device=token_BS.device)
        context = RoutingContext(token_BS=token_BS, groups=groups, index_T=index_T, training=None)
        x_BSD = self.model.extend(self.embed(token_BS, groups), step, context, cache)
        cache.advance(step)
        parts = [linear_forward(group.of(x_BSD)[:, -1], weight) for group, weight in self._heads(groups)]
        return self._merge(groups, parts)

    def embed(self, token_BS: Tensor, groups: tuple[DomainGroup, ...]) -> Tensor:
        """Look the tokens up, each sequence in its domain's slot."""
        embedding = self.model.embed_tokens
        if self.config.num_slots == 1:
            return self.vocabulary.embed(token_BS, embedding.of(0))
        slots = [self.registry.domains[group.domain].slot for group in groups]
        parts = [self.vocabulary.embed(g.of(token_BS), embedding.of(slot)) for g, slot in zip(groups, slots)]
        return merge_groups(groups, parts)

    def logits(self, x_BSD: Tensor, groups: tuple[DomainGroup, ...]) -> Tensor:
        """Return `[B, S, V]` of the normed hidden states."""
        return self._merge(
            groups, [self.vocabulary.logits(group.of(x_BSD), weight) for group, weight in self._heads(groups)]
        )

    def _heads(self, groups: tuple[DomainGroup, ...]) -> list[tuple[DomainGroup, Tensor]]:
        """Return the groups that share a head product, with its weight."""
        head = self.model.embed_tokens if self.config.tie_embeddings else self.lm_head
        if self.config.num_slots == 1:
            return [(DomainGroup(domain=0, rows=None), head.of(0))]
        return [(group, head.of(self.registry.domains[group.domain].slot)) for group in groups]

    def _merge(self, groups: tuple[DomainGroup, ...], parts: list[Tensor]) -> Tensor:
        return merge_groups(groups, parts) if self.config.num_slots > 1 else parts[0]
