"""Inheritance (PanGu-Sigma, Ren et al. 2023): a sparse model that begins as its dense parent, expert by expert.

Every expert is a copy of its layer's feed-forward network and every embedding slot one of the parent's embedding, so
whatever a router chooses, weights that sum to 1 give the parent's output: at step 0 the logits are equal. Gates and the
rows of new token ids are drawn, keyed by (seed, name).
"""

import dataclasses
import re
from collections.abc import Mapping

from .canonical import expected_shapes
from .config import ModelConfig, RouterConfig
from .domains import DomainRegistry
from .hf.names import dense_name

_SLOT = re.compile(r"\.slots\.\d+\.weight$")


def inherited_config(
    parent: ModelConfig,
    router: RouterConfig,
    *,
    sparse_layers: str,
    embedding_slots: Mapping[str, int] | None,
    vocab_size: int,
) -> ModelConfig:
    """Return the config of a sparse model that inherits from the dense `parent`; experts are as wide as its layers.

    Raises ValueError where the parent is not dense, or its vocabulary is larger than `vocab_size`.
    """
    if parent.sparse_layer_ids:
        raise ValueError("its layers are sparse already: router= makes a sparse model of a dense one")
    if parent.num_slots > 1:
        raise ValueError("it has several embedding slots: extract one domain first")
    if vocab_size < parent.vocab_size:
        raise ValueError(f"its vocabulary of {parent.vocab_size} does not fit into one of {vocab_size}")
    config = dataclasses.replace(
        parent,
        vocab_size=vocab_size,
        expert_dim=parent.dense_dim,
        ffn_dim=parent.dense_dim,
        sparse_layers=sparse_layers,
        embedding_slots=embedding_slots,
        router=router,
    )
    if not config.sparse_layer_ids:
        raise ValueError("sparse_layers=none leaves nothing to inherit into: all, every:N or upper:N")
    return config


def inherited_registry(config: ModelConfig, names: tuple[str, ...]) -> DomainRegistry:
    """Return the registry of a sparse model with domains `names`.

    Raises ValueError where a token's experts have weights that do not sum to 1: the output would not be the parent's.
    """
    router = config.router
    # Without renormalisation any top_k is allowed, so what is wrong here is told in inheritance's words.
    anyhow = dataclasses.replace(config, router=dataclasses.replace(router, renormalize=False)).build_registry(names)
    sizes = {len(experts) for domain in anyhow.domains for experts in domain.experts}
    if router.name != "rre" and sizes != {router.top_k}:
        if router.top_k == 1:
            raise ValueError(
                "router.top_k=1 weighs a token's expert with less than 1, so step 0 would not be the parent's: "
                "router.top_k=2 or more, sets of one expert, or router=rre"
            )
        if not router.renormalize:
            raise ValueError(
                "router.renormalize=false gives a token's experts weights that do not sum to 1, so step 0 would not be "
                "the parent's: router.renormalize=true"
            )
    return config.build_registry(names)


def inherited_sources(config: ModelConfig, registry: DomainRegistry) -> dict[str, str | None]:
    """Return where each tensor of the sparse model comes from: the parent's tensor of that name, or None: it is new."""
    return {name: _source(name) for name in expected_shapes(config, registry)}


def _source(name: str) -> str | None:
    return None if ".block_sparse_moe.gate." in name else _SLOT.sub(".weight", dense_name(name))
