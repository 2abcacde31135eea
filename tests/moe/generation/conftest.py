"""Small odd-shaped models with random weights, large enough that every part matters."""

import pytest
import torch

from sigmoe.moe.canonical import canonical_tensors
from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.model import Transformer

ROUTERS = {
    "top_k": RouterConfig(name="top_k", num_experts=5),
    "bias": RouterConfig(name="top_k", num_experts=5, balance="bias", renormalize=False),
    "domain_top_k": RouterConfig(name="domain_top_k", sets={"a": (0, 1, 2), "b": (2, 3, 4, 5)}),
    "rre": RouterConfig(name="rre", sets={"a": 2, "b": 3}, top_k=1, balance="none"),
}


def route_table(config):
    sizes = [len(domain.experts[0]) for domain in config.build_registry(("a", "b")).domains]
    return torch.stack([torch.randint(size, (config.vocab_size,)) for size in sizes])


@pytest.fixture(scope="session")
def build():
    """Build a model by its router or the name of one."""

    def of(router="top_k", **changes):
        router = ROUTERS[router] if isinstance(router, str) else router
        shape = {"vocab_size": 37, "dim": 18, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "head_dim": 4}
        layers = {"sparse_layers": "upper:2", "expert_dim": 11, "ffn_dim": 7}
        config = ModelConfig(**{**shape, **layers, "router": router, **changes})
        model = Transformer(config, config.build_registry(("a", "b"))).requires_grad_(False)
        torch.manual_seed(0)
        for name, tensor in canonical_tensors(model).items():
            if name.endswith("route_table"):
                tensor.copy_(route_table(config))
            elif name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                tensor.uniform_(-0.3, 0.3)
            else:
                tensor.normal_(std=0.4)
        return model

    return of


@pytest.fixture
def prompts():
    """Token ids of different lengths."""
    torch.manual_seed(3)
    return [torch.randint(37, (length,)).tolist() for length in (9, 1, 17, 4)]
