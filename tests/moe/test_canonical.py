import pytest
import torch

from sigmoe.moe.canonical import canonical_tensors, canonical_views, expected_shapes, expert_of
from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.model import Transformer

GLOBAL = RouterConfig(name="top_k", num_experts=3)
BIASED = RouterConfig(name="domain_top_k", sets={"a": (0, 1), "b": (1, 2, 3)}, balance="bias")
TABLE = RouterConfig(name="rre", sets={"a": ((0, 1), (0,)), "b": ((1, 2), (1, 2, 3))}, top_k=1, balance="none")


def build(router=GLOBAL, **changes):
    shape = {"vocab_size": 13, "dim": 6, "num_layers": 2, "num_heads": 3, "num_kv_heads": 1, "head_dim": 4}
    config = ModelConfig(**{**shape, "expert_dim": 5, "ffn_dim": 7, "router": router, **changes})
    return Transformer(config, config.build_registry(("a", "b")))


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in canonical_tensors(model).items()}


def attention(layer):
    prefix = f"model.layers.{layer}"
    return {
        f"{prefix}.input_layernorm.weight": (6,),
        f"{prefix}.post_attention_layernorm.weight": (6,),
        f"{prefix}.self_attn.q_proj.weight": (12, 6),
        f"{prefix}.self_attn.k_proj.weight": (4, 6),
        f"{prefix}.self_attn.v_proj.weight": (4, 6),
        f"{prefix}.self_attn.o_proj.weight": (6, 12),
    }


def experts(layer, count):
    prefix = f"model.layers.{layer}.block_sparse_moe.experts"
    return {
        f"{prefix}.{expert}.{name}.weight": (6, 5) if name == "w2" else (5, 6)
        for expert in range(count)
        for name in ("w1", "w2", "w3")
    }


def test_names_of_a_mixtral_are_mixtrals():
    expected = {"model.embed_tokens.weight": (13, 6), "model.norm.weight": (6,), "lm_head.weight": (13, 6)}
    for layer in range(2):
        expected |= (
            attention(layer) | experts(layer, 3) | {f"model.layers.{layer}.block_sparse_moe.gate.weight": (3, 6)}
        )
    assert shapes(build()) == expected


def test_names_of_what_mixtral_lacks():
    model = build(BIASED, sparse_layers="upper:1", qk_norm="head", embedding_slots={"b": 1}, tie_embeddings=True)
    expected = {"model.embed_tokens.slots.0.weight": (13, 6), "model.embed_tokens.slots.1.weight": (13, 6)}
    expected |= {"model.norm.weight": (6,)} | attention(0) | attention(1) | experts(1, 4)
    expected |= {f"model.layers.{i}.self_attn.{name}_norm.weight": (4,) for i in range(2) for name in "qk"}
    dense = {"gate_proj": (7, 6), "up_proj": (7, 6), "down_proj": (6, 7)}
    expected |= {f"model.layers.0.mlp.{name}.weight": shape for name, shape in dense.items()}
    expected |= {"model.layers.1.block_sparse_moe.gate.weight": (4, 6)}
    expected |= {"model.layers.1.block_sparse_moe.gate.e_score_correction_bias": (4,)}
    assert shapes(model) == expected


def test_names_of_tables_and_of_layers_with_different_experts():
    model = build(TABLE, qk_norm="width")
    expected = {"model.embed_tokens.weight": (13, 6), "model.norm.weight": (6,), "lm_head.weight": (13, 6)}
    for layer, count in enumerate((3, 4)):
        expected |= attention(layer) | experts(layer, count)
        expected |= {f"model.layers.{layer}.block_sparse_moe.gate.route_table": (2, 13)}
        expected |= {f"model.layers.{layer}.self_attn.q_norm.weight": (12,)}
        expected |= {f"model.layers.{layer}.self_attn.k_norm.weight": (4,)}
    assert shapes(model) == expected


@pytest.mark.parametrize("router", [GLOBAL, BIASED, TABLE])
@pytest.mark.parametrize("changes", [{}, {"sparse_layers": "every:2", "embedding_slots": {"a": 1}, "qk_norm": "head"}])
def test_expected_shapes_are_the_real_ones(router, changes):
    if router is TABLE and "sparse_layers" in changes:
        router = RouterConfig(name="rre", sets=2, top_k=1, balance="none")
    model = build(router, **changes)
    assert expected_shapes(model.config, model.registry) == shapes(model)


def test_views_share_memory_and_cover_it_once():
    model = build(BIASED, sparse_layers="upper:1")
    tensors = canonical_tensors(model)
    for number, tensor in enumerate(tensors.values()):
        tensor.fill_(number + 1)
    assert all((tensor == number + 1).all() for number, tensor in enumerate(tensors.values()))
    state = model.state_dict()
    assert sum(t.numel() for t in tensors.values()) == sum(t.numel() for t in state.values())
    assert all((tensor != 0).all() for tensor in state.values())
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_where_an_expert_lies_in_the_stack():
    model = build()
    tensors, moe = canonical_tensors(model), model.model.layers[1].block_sparse_moe
    with torch.no_grad():
        moe.experts.gate_up.normal_()
        moe.experts.down.normal_()
    prefix = "model.layers.1.block_sparse_moe.experts.2"
    assert torch.equal(tensors[f"{prefix}.w1.weight"], moe.experts.gate_up[2, :5])
    assert torch.equal(tensors[f"{prefix}.w3.weight"], moe.experts.gate_up[2, 5:])
    assert torch.equal(tensors[f"{prefix}.w2.weight"], moe.experts.down[2])
    assert all(tensor.is_contiguous() for tensor in tensors.values())


def test_moments_go_by_the_same_names():
    model = build(sparse_layers="upper:1")
    names = [
        name
        for parameter, tensor in model.named_parameters()
        for name, _ in canonical_views(parameter, torch.zeros_like(tensor))
    ]
    assert sorted(names) == sorted(canonical_tensors(model))
    moment = torch.arange(3 * 10 * 6).view(3, 10, 6)
    views = dict(canonical_views("model.layers.1.block_sparse_moe.experts.gate_up", moment))
    assert torch.equal(views["model.layers.1.block_sparse_moe.experts.1.w3.weight"], moment[1, 5:])
    assert [name for name, _ in canonical_views("lm_head.weight", moment)] == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.3.block_sparse_moe.experts.5.w1.weight", (3, 5)),
        ("model.layers.10.block_sparse_moe.experts.127.w2.weight", (10, 127)),
        ("model.layers.3.block_sparse_moe.experts.5.w4.weight", None),
        ("model.layers.3.block_sparse_moe.experts.5.w1.weight.exp_avg", None),
        ("model.layers.3.block_sparse_moe.gate.weight", None),
        ("xmodel.layers.3.block_sparse_moe.experts.5.w1.weight", None),
        ("model.norm.weight", None),
    ],
)
def test_expert_of(name, found):
    assert expert_of(name) == found
