import pytest
import torch

from sigmoe.moe.canonical import canonical_tensors
from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.initialize import draw, initialize
from sigmoe.moe.model import Transformer


def weights(seed=0, num_experts=6, router=None, **changes):
    shape = {"vocab_size": 331, "dim": 24, "num_layers": 2, "num_heads": 6, "num_kv_heads": 2, "expert_dim": 40}
    router = router or RouterConfig(name="top_k", num_experts=num_experts)
    config = ModelConfig(**{**shape, "router": router, **changes})
    model = Transformer(config, config.build_registry(("a", "b")))
    for tensor in canonical_tensors(model).values():
        tensor.fill_(7)  # whatever is not drawn would show
    initialize(model, seed)
    return canonical_tensors(model)


EXPERT = "model.layers.1.block_sparse_moe.experts.5"


def test_same_seed_same_bits_and_another_seed_others():
    first, again, other = weights(), weights(), weights(seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if not name.endswith("norm.weight"))


def test_every_tensor_is_drawn_by_its_own_key():
    drawn = [tensor.flatten()[:8].tolist() for name, tensor in weights().items() if not name.endswith("norm.weight")]
    assert len({tuple(row) for row in drawn}) == len(drawn)


def test_an_expert_does_not_depend_on_how_many_there_are():
    few, many = weights(num_experts=6), weights(num_experts=9)
    assert all(torch.equal(few[f"{EXPERT}.w{i}.weight"], many[f"{EXPERT}.w{i}.weight"]) for i in (1, 2, 3))


def test_nor_on_the_other_layers():
    few, many = weights(), weights(num_layers=8)
    assert torch.equal(few[f"{EXPERT}.w1.weight"], many[f"{EXPERT}.w1.weight"])
    assert torch.equal(few[f"{EXPERT}.w3.weight"], many[f"{EXPERT}.w3.weight"])
    # what writes into the residual stream is narrower by sqrt(2 * layers): half as wide with four times the layers
    assert torch.equal(few[f"{EXPERT}.w2.weight"], many[f"{EXPERT}.w2.weight"] * 2)
    dense = weights(sparse_layers="upper:1")
    assert all(torch.equal(few[f"{EXPERT}.w{i}.weight"], dense[f"{EXPERT}.w{i}.weight"]) for i in (1, 2, 3))


@pytest.mark.parametrize("changes", [{}, {"sparse_layers": "upper:1", "qk_norm": "head", "embedding_slots": {"b": 1}}])
def test_widths(changes):
    for name, tensor in weights(init_std=0.05, **changes).items():
        if name.endswith("norm.weight"):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
            continue
        narrow = name.endswith(("o_proj.weight", "w2.weight", "down_proj.weight"))
        std = 0.05 / 2 if narrow else 0.05
        error = 5 / tensor.numel() ** 0.5
        assert float(tensor.std()) == pytest.approx(std, rel=error), name
        assert abs(float(tensor.mean())) < std * error, name
        assert float(tensor.abs().max()) > 2 * std, name


def test_selection_bias_starts_at_zero():
    router = RouterConfig(name="domain_top_k", sets=2, balance="bias")
    biases = [tensor for name, tensor in weights(router=router).items() if name.endswith("bias")]
    assert len(biases) == 2
    assert not any(bias.any() for bias in biases)


def test_tables_are_left_alone():
    router = RouterConfig(name="rre", sets=2, top_k=1, balance="none")
    tables = [tensor for name, tensor in weights(router=router).items() if name.endswith("route_table")]
    assert len(tables) == 2
    assert all((table == 7).all() for table in tables)


def test_golden_draw():
    drawn = draw("model.norm.weight", (3,), 0.5, 0)
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, torch.tensor([0.19263212, -0.39845374, -0.46300642]), rtol=1e-6, atol=1e-7)


def test_names_whose_keys_share_their_lower_half_differ(monkeypatch):
    keys = iter([5, 5 + 2**32])
    monkeypatch.setattr("sigmoe.moe.keyed.seed_of", lambda *parts: next(keys))
    assert not torch.equal(draw("a", (4,), 1.0, 0), draw("b", (4,), 1.0, 0))
