"""What a model is: frozen configs that validate themselves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .domains import DomainRegistry, build_registry

ExpertIds = tuple[int, ...]

_MOST_SETS = 1 << 20  # experts of a domain times layers: above, no model but a slip of the hand, and a registry of GBs


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens choose experts. `top_k` routes over all experts, the other two inside their domain's set."""

    name: Literal["top_k", "domain_top_k", "rre"]
    num_experts: int | tuple[int, ...] | None = None  # top_k: experts of a sparse layer, or one number a sparse layer
    # domain routers: experts a domain (a number for all), or by name a number, expert ids, or ids for each sparse layer
    sets: int | Mapping[str, int | ExpertIds | tuple[ExpertIds, ...]] | None = None
    top_k: int = 2
    renormalize: bool = True  # the chosen experts' weights sum to 1
    balance: Literal["none", "loss", "bias"] = "loss"
    balance_scope: Literal["sequence", "batch"] = "sequence"
    auxiliary_loss: float = 0.01  # coefficient of the balance loss
    z_loss: float = 0.0  # coefficient of mean(logsumexp^2) of the router's logits
    bias_rate: float = 1e-3  # step of the selection bias, balance=bias
    capacity_factor: float | None = None  # None: dropless
    jitter: float = 0.0  # training: router input times uniform(1 - jitter, 1 + jitter)

    def __post_init__(self) -> None:
        counts = self.num_experts if isinstance(self.num_experts, tuple) else (self.num_experts or 0,)
        fewest = min(counts, default=0)
        if self.name == "top_k" and (fewest < 1 or self.sets is not None):
            raise ValueError("router top_k needs num_experts of at least 1, and no sets")
        if self.name != "top_k" and (self.sets is None or self.num_experts is not None):
            raise ValueError(f"router {self.name} needs sets (experts of each domain), and no num_experts")
        if isinstance(self.sets, int) and self.sets < 1:
            raise ValueError(f"sets must be at least 1, got {self.sets}")
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.name == "top_k" and self.top_k > fewest:
            raise ValueError(f"top_k is {self.top_k}, but there are {fewest} experts: lower top_k")
        if self.name == "rre" and (self.top_k != 1 or self.balance != "none" or self.z_loss or self.jitter):
            raise ValueError("router rre has no gate: top_k must be 1, balance none, z_loss 0, jitter 0")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(f"capacity_factor must be above 0 (or null for dropless), got {self.capacity_factor}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must lie in [0, 1), got {self.jitter}")
        for name in ("auxiliary_loss", "z_loss", "bias_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder-only transformer with dense and sparse layers."""

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int | None = None  # None: dim / num_heads
    expert_dim: int
    ffn_dim: int | None = None  # hidden width of dense layers; None: expert_dim
    sparse_layers: str = "all"  # all, none, every:N (the N-th, 2N-th ...), upper:N (the last N)
    qk_norm: Literal["none", "head", "width"] = "none"
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    sliding_window: int | None = None
    tie_embeddings: bool = False
    embedding_slots: Mapping[str, int] | None = None  # domain -> slot; others use slot 0
    init_std: float = 0.02
    router: RouterConfig

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "expert_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(
                f"dim {self.dim} is not divisible by num_heads {self.num_heads}: change one, or set head_dim"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}: change one"
            )
        if self.head_width < 2 or self.head_width % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_width}")
        for name in ("head_dim", "ffn_dim", "sliding_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 (or null), got {value}")
        for name in ("norm_eps", "rope_theta", "init_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        listed, sparse = self.router.num_experts, _sparse_ids(self.sparse_layers, self.num_layers)
        if isinstance(listed, tuple) and len(listed) != len(sparse):
            raise ValueError(f"router.num_experts lists {len(listed)} layers, but there are {len(sparse)} sparse ones")
        slots = set((self.embedding_slots or {}).values()) | {0}
        if slots != set(range(len(slots))):
            raise ValueError(f"embedding_slots must use every slot from 0 on, got {sorted(slots)}")

    @property
    def head_width(self) -> int:
        """C, the width of one head."""
        return self.head_dim if self.head_dim is not None else self.dim // self.num_heads

    @property
    def dense_dim(self) -> int:
        """Hidden width of the dense layers."""
        return self.ffn_dim if self.ffn_dim is not None else self.expert_dim

    @property
    def num_slots(self) -> int:
        """Number of embedding slots."""
        return len(set((self.embedding_slots or {}).values()) | {0})

    @property
    def sparse_layer_ids(self) -> tuple[int, ...]:
        """Ids of the sparse layers, ascending."""
        return tuple(_sparse_ids(self.sparse_layers, self.num_layers))

    @property
    def gated_experts(self) -> tuple[int, ...]:
        """Experts of each sparse layer under router top_k."""
        number = self.router.num_experts
        assert number is not None
        return number if isinstance(number, tuple) else (number,) * len(self.sparse_layer_ids)

    @property
    def routes_by_domain(self) -> bool:
        """Whether sparse layers choose experts inside a domain's set."""
        return self.router.name != "top_k" and bool(self.sparse_layer_ids)

    @property
    def computes_by_domain(self) -> bool:
        """Whether a sequence's domain changes what is computed: by its experts, or by its embedding slot."""
        return self.routes_by_domain or self.num_slots > 1

    def build_registry(self, names: tuple[str, ...]) -> DomainRegistry:
        """Give every domain of `names` its expert set and embedding slot; raise ValueError where they don't fit."""
        sets = self.router.sets
        listed = self.router.num_experts if isinstance(self.router.num_experts, tuple) else (self.router.num_experts,)
        given = sets.values() if isinstance(sets, Mapping) else (sets, *listed)
        most = max([1, *(number for number in given if isinstance(number, int))])
        if most * self.num_layers > _MOST_SETS:
            raise ValueError(
                f"{self.num_layers} layers with {most} expert(s) a domain are too many (their product may be "
                f"{_MOST_SETS:,}): make the model smaller"
            )
        if sets is None:
            sets = dict.fromkeys(names, tuple(tuple(range(number)) for number in self.gated_experts))
        registry = build_registry(names, sets, len(self.sparse_layer_ids), self.embedding_slots)
        check_registry(self, registry)
        return registry


def check_registry(config: ModelConfig, registry: DomainRegistry) -> None:
    """Raise ValueError where `registry` does not fit `config`."""
    num_sparse = len(config.sparse_layer_ids)
    for domain in registry.domains:
        if len(domain.experts) != num_sparse:
            raise ValueError(
                f"domain {domain.name!r} has expert sets for {len(domain.experts)} of {num_sparse} sparse layers"
            )
        if not 0 <= domain.slot < config.num_slots:
            raise ValueError(f"domain {domain.name!r} uses embedding slot {domain.slot} of {config.num_slots}")
    for index, layer in enumerate(config.sparse_layer_ids):
        for name, experts in zip(registry.names, registry.sets(index)):
            if config.router.top_k > len(experts):
                raise ValueError(
                    f"router.top_k is {config.router.top_k}, but domain {name!r} has {len(experts)} expert(s) in layer "
                    f"{layer}: lower top_k or give it more experts"
                )
            if config.router.name != "rre" and config.router.top_k == 1 < len(experts) and config.router.renormalize:
                raise ValueError("router.top_k=1 makes every renormalised weight 1: set router.renormalize=false")
        used = {expert for experts in registry.sets(index) for expert in experts}
        if used != set(range(len(used))):
            gap = next(expert for expert in range(len(used)) if expert not in used)
            raise ValueError(f"layer {layer}: expert {gap} belongs to no domain: number experts without gaps")
        if config.router.name == "top_k" and config.gated_experts[index] != len(used):
            raise ValueError(
                f"router.num_experts is {config.gated_experts[index]}, but the registry has {len(used)} experts in "
                f"layer {layer}: make them equal"
            )


def num_experts(registry: DomainRegistry, sparse_index: int) -> int:
    """Number of experts of the `sparse_index`-th sparse layer."""
    return 1 + max(expert for experts in registry.sets(sparse_index) for expert in experts)


def layer_experts(config: ModelConfig, registry: DomainRegistry) -> list[int]:
    """Number of experts of each sparse layer."""
    return [num_experts(registry, index) for index in range(len(config.sparse_layer_ids))]


def _sparse_ids(spec: str, num_layers: int) -> range:
    kind, _, text = spec.partition(":")
    if spec == "all":
        return range(num_layers)
    if spec == "none":
        return range(0)
    if kind in ("every", "upper") and text.isdecimal() and 1 <= int(text) <= num_layers:
        count = int(text)
        return range(count - 1, num_layers, count) if kind == "every" else range(num_layers - count, num_layers)
    raise ValueError(f"sparse_layers must be all, none, every:N or upper:N with N up to {num_layers}, got {spec!r}")
