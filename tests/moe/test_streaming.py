"""A model run layer by layer gives the bits of the model in memory, and reads no more than it needs."""

from dataclasses import replace

import pytest
import torch

from sigmoe.moe.batch import IGNORED, Batch
from sigmoe.moe.canonical import canonical_tensors, expert_of, slot_of
from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.initialize import initialize
from sigmoe.moe.model import Transformer
from sigmoe.moe.parsing import to_mapping
from sigmoe.moe.route_table import fill_route_tables
from sigmoe.moe.storage.checkpoint import CheckpointContent, write_checkpoint
from sigmoe.moe.storage.tensors import named_tensors
from sigmoe.moe.stored import load_model, open_model
from sigmoe.moe.streaming import StreamedModel

NAMES = ("a", "b", "c")
SETS = {"a": (0, 1, 2), "b": (1, 3), "c": (4, 5)}
ROUTERS = {
    "global gate": RouterConfig(name="top_k", num_experts=5),
    "gate and bias": RouterConfig(name="domain_top_k", sets=SETS, balance="bias"),
    "table": RouterConfig(name="rre", sets=SETS, top_k=1, balance="none"),
}
CHANGES = {
    "plain": {},
    "slots": {"embedding_slots": {"b": 1, "c": 2}},
    "slots tied, norms": {"embedding_slots": {"c": 1}, "tie_embeddings": True, "qk_norm": "width"},
    "tied, window": {"tie_embeddings": True, "sliding_window": 4, "qk_norm": "head", "sparse_layers": "all"},
}


def write_model(path, router, **changes):
    shape = {"vocab_size": 53, "dim": 22, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "head_dim": 6}
    layers = {"sparse_layers": "upper:2", "expert_dim": 19, "ffn_dim": 18, "init_std": 0.3}
    config = ModelConfig(**{**shape, **layers, **changes, "router": router})
    model = Transformer(config, config.build_registry(NAMES))
    initialize(model, 0)
    fill_route_tables(model, {name: torch.arange(53) % 7 for name in NAMES}, 0)
    tensors = canonical_tensors(model)
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensor.copy_(torch.linspace(-0.2, 0.2, len(tensor)))
    content = CheckpointContent(
        model=named_tensors(tensors),
        optimizer={},
        state={"step": 1},
        config={"model": to_mapping(config), "sequence_length": 16},
        registry=model.registry.to_json(),
        tokenizer=None,
        hf_config=None,
    )
    write_checkpoint(path, content)
    return open_model(path)


def logits_of(streamed, batches, *on_layer):
    return streamed.run_head(streamed.run_layers(batches, *on_layer))


def batch_of(domains, length, seed=0):
    shape = (len(domains), length)
    start_BS = torch.zeros(shape, dtype=torch.int64)
    start_BS[:, length // 3 :] = length // 3
    return Batch(
        token_BS=torch.randint(53, shape, generator=torch.Generator().manual_seed(seed)),
        label_BS=torch.full(shape, IGNORED),
        start_BS=start_BS,
        domain_B=torch.tensor(domains),
        sample_B=torch.arange(len(domains)),
    )


@torch.no_grad()
def in_memory(model, batch):
    return model(batch.token_BS, start_BS=batch.start_BS, domain_B=batch.domain_B).logits_BSV


class Noted:
    """A TensorReader that notes which tensors are read."""

    def __init__(self, reader):
        self.reader, self.read_names = reader, []

    def read_into(self, name, target):
        self.read_names.append(name)
        self.reader.read_into(name, target)


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_its_logits_are_those_of_the_model_in_memory(tmp_path, router, changes):
    stored = write_model(tmp_path / "model", router, **changes)
    batches = [batch_of([1, 1], 7), batch_of([0, 2, 1], 13, seed=1), batch_of([2], 1, seed=2)]
    model = load_model(stored)
    for batch, logits_BSV in zip(batches, logits_of(StreamedModel(stored), batches), strict=True):
        assert torch.equal(logits_BSV, in_memory(model, batch))
        assert logits_BSV.isfinite().all()


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_rounded_it_is_the_copy_in_that_dtype(tmp_path, router):
    stored = write_model(tmp_path / "model", router)
    rounded, exact = load_model(stored, dtype=torch.bfloat16).float(), load_model(stored)
    batch = batch_of([0, 0], 9)
    (logits_BSV,) = logits_of(StreamedModel(stored, rounding=torch.bfloat16), [batch])
    assert torch.equal(logits_BSV, in_memory(rounded, batch))
    assert not torch.equal(logits_BSV, in_memory(exact, batch))


@pytest.mark.parametrize("changes", [CHANGES["slots"], CHANGES["slots tied, norms"]], ids=["untied", "tied"])
@pytest.mark.parametrize("domains", [[1], [2, 0]], ids=["one domain", "two"])
@pytest.mark.parametrize("router", ["gate and bias", "table"])
def test_experts_and_slots_of_other_domains_are_never_read(tmp_path, router, domains, changes):
    stored = write_model(tmp_path / "model", ROUTERS[router], **changes)
    noted = Noted(stored.tensors)
    streamed = StreamedModel(replace(stored, tensors=noted), domains=domains)
    batches = [batch_of(domains * 2, 8), batch_of(domains[:1], 5, seed=1)]
    for batch, logits_BSV in zip(batches, logits_of(streamed, batches), strict=True):
        assert torch.equal(logits_BSV, in_memory(load_model(stored), batch))
    chosen = [stored.registry.domains[id] for id in domains]
    wanted = {expert for domain in chosen for expert in domain.experts[0]}
    assert {expert_of(name)[1] for name in noted.read_names if expert_of(name)} == wanted
    assert {slot_of(name) for name in noted.read_names} - {None} == {domain.slot for domain in chosen}
    # Each weight once, however many batches there are; a tied head is the embedding read again.
    again = [name for name in set(noted.read_names) if noted.read_names.count(name) > 1]
    assert all(stored.config.tie_embeddings and name.startswith("model.embed_tokens") for name in again)


def test_a_batch_of_another_domain_is_refused(tmp_path):
    stored = write_model(tmp_path / "model", ROUTERS["table"])
    streamed = StreamedModel(stored, domains=[1])
    with pytest.raises(ValueError, match="domain id 2 is not among those whose weights are read"):
        list(logits_of(streamed, [batch_of([1, 2], 4)]))
    with pytest.raises(ValueError, match="domain id 3 is not one of this model's 3"):
        list(logits_of(streamed, [batch_of([3], 4)]))


def test_layers_are_told_and_leave_the_memory(tmp_path):
    stored = write_model(tmp_path / "model", ROUTERS["table"])
    streamed, told = StreamedModel(stored), []
    logits = logits_of(streamed, [batch_of([0], 4)], lambda: told.append(len(told)))
    list(logits)
    assert told == [0, 1, 2]
    assert {parameter.device.type for parameter in streamed._model.parameters()} == {"meta"}
