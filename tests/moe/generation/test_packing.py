"""Packed weights change where a model is read from, not what it says."""

import pytest
import torch

from sigmoe.moe.cache import KeyValueCache
from sigmoe.moe.generation.generate import GenerationConfig, generate

DOMAINS = torch.tensor([1, 0, 0, 1])
CHANGES = {
    "plain": {},
    "norms": {"qk_norm": "width"},
    "tied": {"tie_embeddings": True, "sparse_layers": "none"},
    "slots": {"embedding_slots": {"b": 1}, "sparse_layers": "all"},
    "tied slots": {"embedding_slots": {"b": 1}, "tie_embeddings": True},
}


def logits(model):
    torch.manual_seed(6)
    cache = KeyValueCache(model.config, batch=4, capacity=40)
    sizes = (30, 1, 1, 5)
    return [model.extend(torch.randint(37, (4, size)), cache, domain_B=DOMAINS) for size in sizes]


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("router", ["top_k", "domain_top_k", "rre"])
def test_the_same_logits(build, router, changes):
    model, other = build(router, **changes), build(router, **changes)
    other.pack()
    for plain_BV, packed_BV in zip(logits(model), logits(other)):
        assert float((plain_BV - packed_BV).norm() / plain_BV.norm()) < 1e-5


def test_the_same_texts_and_no_weight_twice(build, prompts):
    model, other = build("domain_top_k"), build("domain_top_k")
    other.pack()
    config = GenerationConfig(max_tokens=10)
    assert generate(other, prompts, config, domain_ids=[0] * 4) == generate(model, prompts, config, domain_ids=[0] * 4)
    assert not any("proj" in name or "experts" in name or "lm_head" in name for name, _ in other.named_parameters())
