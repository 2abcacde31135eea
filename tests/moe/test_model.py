import pytest
import torch
from torch.nn import functional

from sigmoe.moe.batch import IGNORED
from sigmoe.moe.canonical import canonical_tensors
from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.model import Transformer
from sigmoe.moe.routing import TrainingPass

NAMES = ("a", "b")
GLOBAL = RouterConfig(name="top_k", num_experts=5)
DOMAIN = RouterConfig(name="domain_top_k", sets={"a": (0, 1, 2), "b": (2, 3, 4, 5)})
TABLE = RouterConfig(name="rre", sets={"a": 2, "b": 3}, top_k=1, balance="none")


def build(seed=0, **changes):
    """A small odd-shaped model with random weights (large enough that every part matters)."""
    shape = {"vocab_size": 37, "dim": 18, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "head_dim": 4}
    config = ModelConfig(**{**shape, "expert_dim": 11, "ffn_dim": 7, "router": GLOBAL, **changes})
    model = Transformer(config, config.build_registry(NAMES))
    torch.manual_seed(seed)
    for name, tensor in canonical_tensors(model).items():
        if name.endswith("route_table"):
            tensor.copy_(torch.stack([torch.randint(2 + row, (37,)) for row in range(2)]))
        elif name.endswith("norm.weight"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            tensor.uniform_(-0.3, 0.3)
        else:
            tensor.normal_(std=0.3)
    return model


def tokens(batch, length, seed=1):
    torch.manual_seed(seed)
    return torch.randint(37, (batch, length))


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x_SHC, position_S, theta):
    half = x_SHC.shape[-1] // 2
    angle_SZ = position_S[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones_like(angle_SZ), angle_SZ)[:, None]
    turned = torch.complex(x_SHC[..., :half], x_SHC[..., half:]) * turn
    return torch.cat((turned.real, turned.imag), -1)


def attend(config, weights, prefix, x_SD, start_S):
    length, c = len(x_SD), config.head_width
    position_S = torch.arange(length, dtype=torch.float64) - start_S
    heads = {}
    for part, count in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
        flat = x_SD @ weights[f"{prefix}.{part}_proj.weight"].T
        if part != "v" and config.qk_norm == "width":
            flat = rms(flat, weights[f"{prefix}.{part}_norm.weight"], config.norm_eps)
        heads[part] = flat.view(length, count, c)
        if part != "v" and config.qk_norm == "head":
            heads[part] = rms(heads[part], weights[f"{prefix}.{part}_norm.weight"], config.norm_eps)
        if part != "v":
            heads[part] = rotate(heads[part], position_S, config.rope_theta)
    out_SHC = torch.zeros(length, config.num_heads, c, dtype=torch.float64)
    for i in range(length):
        first = max(int(start_S[i]), i - (config.sliding_window or length) + 1, 0)
        for h in range(config.num_heads):
            g = h * config.num_kv_heads // config.num_heads
            score_J = heads["k"][first : i + 1, g] @ heads["q"][i, h] / c**0.5
            out_SHC[i, h] = score_J.softmax(0) @ heads["v"][first : i + 1, g]
    return out_SHC.flatten(1) @ weights[f"{prefix}.o_proj.weight"].T


def feed(weights, prefix, names, x):
    gate, up, down = (weights[f"{prefix}.{name}.weight"] for name in names)
    return (functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def mix(config, registry, weights, layer, x_SD, token_S, domain):
    prefix = f"model.layers.{layer}.block_sparse_moe"
    index = config.sparse_layer_ids.index(layer)
    experts = range(5) if config.router.name == "top_k" else registry.domains[domain].experts[index]
    out_SD = torch.zeros_like(x_SD)
    for s, x_D in enumerate(x_SD):
        if config.router.name == "rre":
            chosen = {experts[int(weights[f"{prefix}.gate.route_table"][domain, token_S[s]])]: 1.0}
        else:
            prob = dict(zip(experts, (weights[f"{prefix}.gate.weight"][list(experts)] @ x_D).softmax(0).tolist()))
            bias = weights.get(f"{prefix}.gate.e_score_correction_bias", torch.zeros(9))
            best = sorted(prob, key=lambda e: -(prob[e] + float(bias[e])))[: config.router.top_k]
            total = sum(prob[e] for e in best) if config.router.renormalize else 1.0
            chosen = {e: prob[e] / total for e in best}
        for expert, weight in chosen.items():
            out_SD[s] += weight * feed(weights, f"{prefix}.experts.{expert}", ("w1", "w3", "w2"), x_D)
    return out_SD


def reference(model, token_S, start_S, domain):
    """fp64 logits of one sequence, token by token and expert by expert, from the canonical tensors."""
    config, registry = model.config, model.registry
    weights = {name: tensor.double() for name, tensor in canonical_tensors(model).items()}
    weights = {name: t.long() if name.endswith("table") else t for name, t in weights.items()}
    slot = f".slots.{registry.domains[domain].slot}" if config.num_slots > 1 else ""
    x_SD = weights[f"model.embed_tokens{slot}.weight"][token_S]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        normed_SD = rms(x_SD, weights[f"{prefix}.input_layernorm.weight"], config.norm_eps)
        x_SD = x_SD + attend(config, weights, f"{prefix}.self_attn", normed_SD, start_S)
        normed_SD = rms(x_SD, weights[f"{prefix}.post_attention_layernorm.weight"], config.norm_eps)
        if layer in config.sparse_layer_ids:
            x_SD = x_SD + mix(config, registry, weights, layer, normed_SD, token_S, domain)
        else:
            x_SD = x_SD + feed(weights, f"{prefix}.mlp", ("gate_proj", "up_proj", "down_proj"), normed_SD)
    head = "model.embed_tokens" if config.tie_embeddings else "lm_head"
    return rms(x_SD, weights["model.norm.weight"], config.norm_eps) @ weights[f"{head}{slot}.weight"].T


def relative(ours, truth):
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


CONFIGS = [
    {},
    {"router": DOMAIN},
    {"router": TABLE},
    {"router": DOMAIN, "sliding_window": 3, "num_kv_heads": 1, "qk_norm": "head"},
    {"router": DOMAIN, "sparse_layers": "upper:1", "tie_embeddings": True, "num_kv_heads": 6, "qk_norm": "width"},
    {"router": TABLE, "sparse_layers": "every:2", "embedding_slots": {"b": 1}, "rope_theta": 100.0},
    {"router": DOMAIN, "embedding_slots": {"a": 1}, "tie_embeddings": True, "head_dim": 2, "norm_eps": 0.1},
    {"sparse_layers": "none", "embedding_slots": {"b": 1}, "head_dim": None, "dim": 24, "sliding_window": 1},
    {"router": RouterConfig(name="top_k", num_experts=5, top_k=3, renormalize=False)},
    {"router": RouterConfig(name="domain_top_k", sets={"a": 3, "b": 4}, balance="bias", top_k=1, renormalize=False)},
]


@pytest.mark.parametrize("changes", CONFIGS)
@torch.no_grad()
def test_logits_by_hand_on_packed_documents_of_two_domains(changes):
    model = build(**changes)
    token_BS, domain_B = tokens(3, 9), torch.tensor([1, 0, 1])
    start_BS = torch.tensor([[0] * 9, [0] * 4 + [4] * 5, [0] + [1] * 7 + [8]])
    logits_BSV = model(token_BS, start_BS=start_BS, domain_B=domain_B).logits_BSV
    for b in range(3):
        truth = reference(model, token_BS[b], start_BS[b], int(domain_B[b]))
        assert relative(logits_BSV[b], truth) < 1e-5


@pytest.mark.parametrize("changes", CONFIGS)
@torch.no_grad()
def test_losses_are_the_cross_entropy_of_the_logits(changes):
    model = build(**changes)
    token_BS, domain_B = tokens(3, 9), torch.tensor([1, 0, 1])
    label_BS = tokens(3, 9, seed=2)
    label_BS[0, 2:5] = label_BS[2] = IGNORED
    logits_BSV = model(token_BS, domain_B=domain_B).logits_BSV
    truth_BS = functional.cross_entropy(logits_BSV.mT, label_BS, reduction="none", ignore_index=IGNORED)
    output = model(token_BS, domain_B=domain_B, label_BS=label_BS)
    assert output.logits_BSV is None
    torch.testing.assert_close(output.loss_BS, truth_BS, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.loss_sum, truth_BS.sum(), rtol=1e-5, atol=1e-5)
    assert torch.equal(output.loss_BS == 0, label_BS == IGNORED)
    assert output.loss_BS.dtype == output.loss_sum.dtype == torch.float32


@pytest.mark.parametrize("changes", CONFIGS[:4])
@torch.no_grad()
def test_packed_documents_equal_themselves_alone(changes):
    model = build(**changes)
    one, two = tokens(1, 5), tokens(1, 8, seed=2)
    domain_B = torch.tensor([1])
    packed = model(torch.cat((one, two), 1), start_BS=torch.tensor([[0] * 5 + [5] * 8]), domain_B=domain_B).logits_BSV
    alone = [model(document, domain_B=domain_B).logits_BSV for document in (one, two)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_token_sees_the_future():
    model = build(router=DOMAIN)
    token_BS, domain_B = tokens(1, 9), torch.tensor([0])
    before = model(token_BS, domain_B=domain_B).logits_BSV
    changed = token_BS.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 37
    after = model(changed, domain_B=domain_B).logits_BSV
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=1e-5, atol=1e-6)
    assert ((after - before)[0, 6:].abs().amax(1) > 1e-4).all()


@torch.no_grad()
def test_window_bounds_how_far_a_token_reaches():
    model = build(sliding_window=3)
    token_BS = tokens(1, 12)
    changed = token_BS.clone()
    changed[0, 1] = (changed[0, 1] + 1) % 37
    moved_S = (model(changed).logits_BSV - model(token_BS).logits_BSV)[0].abs().amax(1) > 1e-5
    # three layers carry it 2 positions each
    assert moved_S.tolist() == [False] + [True] * 7 + [False] * 4


@torch.no_grad()
def test_mixed_batch_equals_each_domain_alone():
    model = build(router=DOMAIN, embedding_slots={"b": 1})
    token_BS, domain_B = tokens(4, 7), torch.tensor([1, 0, 0, 1])
    label_BS = tokens(4, 7, seed=2)
    mixed = model(token_BS, domain_B=domain_B).logits_BSV
    losses_BS = model(token_BS, domain_B=domain_B, label_BS=label_BS).loss_BS
    for b in range(4):
        row = slice(b, b + 1)
        torch.testing.assert_close(
            model(token_BS[row], domain_B=domain_B[row]).logits_BSV, mixed[row], rtol=1e-4, atol=1e-5
        )
        alone = model(token_BS[row], domain_B=domain_B[row], label_BS=label_BS[row]).loss_BS
        torch.testing.assert_close(alone, losses_BS[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", CONFIGS)
@torch.no_grad()
def test_stats_of_every_sparse_layer(changes):
    model = build(**changes)
    stats = model(tokens(3, 9), domain_B=torch.tensor([1, 0, 1]), training=TrainingPass(seed=0, step=0)).stats
    assert tuple(layer.layer for layer in stats) == model.config.sparse_layer_ids
    for layer in stats:
        assert layer.count_BE.sum(1).tolist() == [9 * model.config.router.top_k] * 3
        assert int(layer.dropped) == 0


@torch.no_grad()
def test_capacity_drops_tokens_in_training_only():
    model = build(router=RouterConfig(name="top_k", num_experts=5, capacity_factor=0.5))
    token_BS = tokens(2, 9)
    assert all(int(layer.dropped) == 0 for layer in model(token_BS).stats)
    trained = model(token_BS, training=TrainingPass(seed=0, step=0))
    # ceil(0.5 * 2 * 9 / 5) = 2 pairs an expert and sequence
    for layer in trained.stats:
        assert int(layer.dropped) == int((layer.count_BE - 2).clamp(min=0).sum()) > 0
    assert not torch.equal(trained.logits_BSV, model(token_BS).logits_BSV)


@torch.no_grad()
def test_samples_are_counted_from_zero_where_none_are_given():
    model = build(router=RouterConfig(name="top_k", num_experts=5, jitter=0.5))
    token_BS, training = tokens(3, 9), TrainingPass(seed=0, step=0)
    default = model(token_BS, training=training).logits_BSV
    assert torch.equal(default, model(token_BS, sample_B=torch.arange(3), training=training).logits_BSV)
    assert not torch.equal(default, model(token_BS, sample_B=torch.arange(1, 4), training=training).logits_BSV)


@torch.no_grad()
def test_bf16_is_close_to_fp32():
    narrow = build(router=DOMAIN).bfloat16()
    wide = build(router=DOMAIN)
    wide.load_state_dict({name: tensor.float() for name, tensor in narrow.state_dict().items()})
    token_BS, domain_B = tokens(2, 9), torch.tensor([0, 1])
    logits_BSV = narrow(token_BS, domain_B=domain_B).logits_BSV
    assert logits_BSV.dtype == torch.bfloat16
    assert relative(logits_BSV, wide(token_BS, domain_B=domain_B).logits_BSV) < 0.03
    loss, truth = (m(token_BS, domain_B=domain_B, label_BS=token_BS).loss_sum.item() for m in (narrow, wide))
    assert loss == pytest.approx(truth, rel=0.03)


def test_every_parameter_gets_a_gradient():
    model = build(router=DOMAIN, sparse_layers="upper:2", embedding_slots={"b": 1}, qk_norm="head")
    token_BS, domain_B = tokens(6, 20), torch.tensor([0, 1] * 3)
    model(token_BS, domain_B=domain_B, label_BS=token_BS).loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("changes", [{"router": DOMAIN}, {"router": TABLE}, {"embedding_slots": {"b": 1}}])
def test_a_missing_domain_is_refused(changes):
    with pytest.raises(ValueError, match="this model routes by domain: give domain=, one of a, b"):
        build(**changes)(tokens(1, 3))


@pytest.mark.parametrize("domain", [-1, 2])
@pytest.mark.parametrize("router", [GLOBAL, DOMAIN])
def test_foreign_domains_are_refused(router, domain):
    with pytest.raises(ValueError, match=f"domain id {domain} is not one of this model's 2"):
        build(router=router)(tokens(2, 3), domain_B=torch.tensor([0, domain]))


def test_a_global_model_needs_no_domain_and_ignores_a_known_one():
    model = build()
    without, given = model(tokens(2, 3)), model(tokens(2, 3), domain_B=torch.tensor([1, 0]))
    assert torch.equal(without.logits_BSV, given.logits_BSV)


def test_a_registry_that_does_not_fit_is_refused():
    model = build(router=DOMAIN)
    with pytest.raises(ValueError, match="'a' has expert sets for 3 of 2 sparse layers"):
        Transformer(build(router=DOMAIN, sparse_layers="upper:2").config, model.registry)
