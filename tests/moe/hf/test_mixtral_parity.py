"""The same weights in transformers' Mixtral and in ours: the same logits, loss, gradients and files."""

import json
from types import SimpleNamespace

import pytest
import torch

from sigmoe.launch.trainer import StepMetrics, Trainer
from sigmoe.moe.canonical import canonical_tensors, canonical_views
from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.hf.config import hf_config
from sigmoe.moe.initialize import initialize
from sigmoe.moe.model import Transformer
from sigmoe.moe.routing import TrainingPass
from sigmoe.moe.storage.durable import durable_directory
from sigmoe.moe.storage.tensor_reader import TensorReader
from sigmoe.moe.storage.tensors import named_tensors, write_tensors

transformers = pytest.importorskip("transformers")
mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")

AUXILIARY = 0.05
EXPERTS, TOP_K = 6, 2
ROUTER = RouterConfig(name="top_k", num_experts=EXPERTS, top_k=TOP_K, auxiliary_loss=AUXILIARY)


def config(**changes):
    shape = {"vocab_size": 331, "dim": 48, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "head_dim": 10}
    return ModelConfig(
        **{**shape, "expert_dim": 36, "rope_theta": 5000.0, "init_std": 0.2, "router": ROUTER, **changes}
    )


def their_config(ours):
    return transformers.MixtralConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.dim,
        intermediate_size=ours.expert_dim,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads,
        head_dim=ours.head_dim,
        rms_norm_eps=ours.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        sliding_window=ours.sliding_window,
        tie_word_embeddings=ours.tie_embeddings,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        router_aux_loss_coef=AUXILIARY / TOP_K,
        max_position_embeddings=64,
        attn_implementation="eager",
        experts_implementation="eager",
    )


def their_model(ours):
    """A Mixtral with random weights, norms included."""
    torch.manual_seed(0)
    model = mixtral.MixtralForCausalLM(their_config(ours)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.2)
    return model


def our_model(ours, source):
    """Our model with the tensors of `source`, whose names must be all of ours and no more."""
    model = Transformer(ours, ours.build_registry(("a",)))
    tensors = canonical_tensors(model)
    assert sorted(source.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        assert source.shape(name) == tuple(tensor.shape), name
        tensor.copy_(source.read(name))
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    return TensorReader(folder, "model")


def relative(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def tokens(batch=3, length=21):
    torch.manual_seed(1)
    return torch.randint(331, (batch, length))


def their_auxiliary(model, token_BS):
    """Their load-balancing loss of each layer and sequence alone, averaged; 1 instead of K at perfect balance."""
    router_logits = model(token_BS, output_router_logits=True).router_logits
    losses = [
        mixtral.load_balancing_loss_func((logits_SE,), EXPERTS, TOP_K)
        for logits_TE in router_logits
        for logits_SE in logits_TE.view(len(token_BS), -1, EXPERTS)
    ]
    return torch.stack(losses).mean() / TOP_K


def our_losses(model, token_BS):
    """Loss per label, and the mean balance loss over layers and tokens."""
    inputs_BS = token_BS[:, :-1]
    output = model(inputs_BS, label_BS=token_BS[:, 1:], training=TrainingPass(seed=0, step=0))
    balance = torch.stack([stats.balance_sum for stats in output.stats]).sum()
    return output.loss_sum / inputs_BS.numel(), balance / (len(output.stats) * inputs_BS.numel())


def our_objective(model, token_BS):
    """What the trainer differentiates, one sequence at a time, and its own figure of the balance."""
    trainer = SimpleNamespace(config=SimpleNamespace(model=model.config))
    metrics = StepMetrics(step=1, lr=0.0, loss_sum_N=torch.zeros(1), labels_N=torch.zeros(1))
    inputs_BS, label_BS = token_BS[:, :-1], token_BS[:, 1:]
    objective = torch.zeros(())
    for row in range(len(token_BS)):
        rows = slice(row, row + 1)
        output = model(inputs_BS[rows], label_BS=label_BS[rows], training=TrainingPass(seed=0, step=0))
        objective = objective + Trainer._objective(trainer, output, inputs_BS.numel(), inputs_BS.numel(), metrics)
    return objective, metrics.aux_loss


def their_losses(model, token_BS):
    logits_BSV = model(token_BS[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), token_BS[:, 1:].flatten())
    return loss, their_auxiliary(model, token_BS[:, :-1])


CHANGES = [
    {},
    {"sliding_window": 5},
    {"tie_embeddings": True, "norm_eps": 0.01},
    {"num_kv_heads": 6, "head_dim": None, "rope_theta": 1e6},
    {"num_kv_heads": 1, "expert_dim": 7},
]


@pytest.mark.parametrize("changes", CHANGES)
@torch.no_grad()
def test_their_files_give_their_logits(changes, tmp_path):
    theirs = their_model(config(**changes))
    ours = our_model(config(**changes), saved(theirs, tmp_path))
    token_BS = tokens()
    assert relative(ours(token_BS).logits_BSV, theirs(token_BS).logits) < 1e-5


def test_loss_and_every_gradient_of_a_step_are_theirs(tmp_path):
    theirs = their_model(config())
    ours = our_model(config(), saved(theirs, tmp_path / "weights"))
    token_BS = tokens()
    our_loss, our_balance = our_losses(ours, token_BS)
    their_loss, their_balance = their_losses(theirs, token_BS)
    assert relative(our_loss.detach(), their_loss.detach()) < 1e-6
    assert relative(our_balance.detach(), their_balance.detach()) < 1e-5
    assert float(our_balance.detach()) > 1.02
    our_total, counted_balance = our_objective(ours, token_BS)
    their_total = their_loss + AUXILIARY * their_balance
    assert relative(our_total.detach(), their_total.detach()) < 1e-6
    assert counted_balance == pytest.approx(float(their_balance.detach()), rel=1e-5)
    our_total.backward()
    their_total.backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    gradients = saved(theirs, tmp_path / "gradients")
    compared = 0
    for name, parameter in ours.named_parameters():
        for canonical, gradient in canonical_views(name, parameter.grad):
            assert relative(gradient, gradients.read(canonical)) < 1e-4, canonical
            compared += 1
    assert compared == len(gradients.names())


def test_the_auxiliary_loss_matters_to_the_gate(tmp_path):
    ours = our_model(config(), saved(their_model(config()), tmp_path))
    gate = ours.model.layers[1].block_sparse_moe.gate.weight
    loss, balance = our_losses(ours, tokens())
    (with_it,) = torch.autograd.grad(AUXILIARY * balance, gate, retain_graph=True)
    (without,) = torch.autograd.grad(loss, gate)
    assert float(with_it.norm() / without.norm()) > 1e-3


def write(model, folder, description):
    tensors = named_tensors(canonical_tensors(model))
    with durable_directory(folder) as directory:
        write_tensors(directory, "model", "model", tensors, max_file_bytes=200_000)
        directory.write("model/config.json", json.dumps(description).encode())


def describe(model):
    return hf_config(model.config, model.registry, sequence_length=64, dtype="float32", end_of_text=3, padding=4)


def load_theirs(folder):
    model, info = mixtral.MixtralForCausalLM.from_pretrained(
        folder / "model", output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(problem), (problem, info[problem])
    return model.eval()


ONE_DOMAIN = RouterConfig(name="domain_top_k", sets={"a": EXPERTS}, top_k=TOP_K, auxiliary_loss=AUXILIARY)


@pytest.mark.parametrize("changes", [*CHANGES, {"router": ONE_DOMAIN}])
@torch.no_grad()
def test_our_checkpoint_is_a_directory_that_they_load(changes, tmp_path):
    ours = Transformer(config(**changes), config(**changes).build_registry(("a",)))
    initialize(ours, 0)
    write(ours, tmp_path / "checkpoint", describe(ours))
    assert len(list((tmp_path / "checkpoint" / "model").glob("*.safetensors"))) > 1
    theirs = load_theirs(tmp_path / "checkpoint")
    token_BS = tokens()
    domain_B = torch.zeros(len(token_BS), dtype=torch.int64)
    logits_BSV = ours(token_BS, domain_B=domain_B).logits_BSV
    assert relative(logits_BSV, theirs(token_BS).logits) < 1e-5
    assert theirs.dtype == torch.float32


def test_every_setting_arrives_in_their_config(tmp_path):
    ours = Transformer(config(sliding_window=5, norm_eps=0.01), config().build_registry(("a",)))
    initialize(ours, 0)
    write(ours, tmp_path / "checkpoint", describe(ours))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "checkpoint" / "model")
    assert loaded.rope_parameters["rope_theta"] == 5000.0
    expected = their_config(ours.config).to_dict()
    for name in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "rms_norm_eps", "sliding_window", "tie_word_embeddings"),
        *("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef", "max_position_embeddings"),
        *("hidden_act", "rope_parameters"),
    ):
        assert loaded.to_dict()[name] == expected[name], name
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.bos_token_id) == (3, 4, None)
    assert loaded.initializer_range == 0.2


@pytest.mark.parametrize(
    "changes",
    [
        {"router": RouterConfig(name="top_k", num_experts=4, renormalize=False)},
        {"router": RouterConfig(name="top_k", num_experts=4, balance="bias")},
        {"router": RouterConfig(name="domain_top_k", sets=2)},
        {"router": RouterConfig(name="rre", sets=2, top_k=1, balance="none")},
        {"router": RouterConfig(name="domain_top_k", sets={"a": ((0, 1), (0, 1, 2), (0, 1)), "b": (0, 1)})},
        {"qk_norm": "head"},
        {"sparse_layers": "upper:2"},
        {"embedding_slots": {"b": 1}},
    ],
)
def test_what_is_no_mixtral_gets_no_config(changes):
    ours = config(**changes)
    registry = ours.build_registry(("a", "b"))
    assert hf_config(ours, registry, sequence_length=8, dtype="float32", end_of_text=0, padding=0) is None


def test_layers_with_different_experts_are_no_mixtral():
    ours = config(router=RouterConfig(name="domain_top_k", sets={"a": ((0, 1), (0, 1, 2), (0, 1))}))
    registry = ours.build_registry(("a",))
    assert hf_config(ours, registry, sequence_length=8, dtype="float32", end_of_text=0, padding=0) is None
