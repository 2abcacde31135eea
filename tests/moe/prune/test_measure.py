"""Losses of parent and pruned model against transformers on the very tokens; a model against itself; before writing."""

import json

import pytest
import torch

from sigmoe.moe.canonical import expected_shapes
from sigmoe.moe.data.dataset import open_dataset
from sigmoe.moe.data.loader import heldout_batches
from sigmoe.moe.extract import SubmodelWriter
from sigmoe.moe.extract.unwritten import unwritten_model
from sigmoe.moe.prune.measure import PruningLoss, measure_domain
from sigmoe.moe.prune.merge import plan_merged
from sigmoe.moe.prune.plan import plan_pruned
from sigmoe.moe.prune.sums import LayerSums
from sigmoe.moe.storage.checkpoint import encode_json
from sigmoe.moe.storage.durable import durable_directory
from sigmoe.moe.stored import open_unfinished

TOKENS = 150
KEPT = ((0, 2, 5), (1, 2, 4), (0, 1, 5))


@pytest.fixture(scope="module")
def texts(dataset):
    return open_dataset(dataset)


def naive(parent, pruned, texts, domain):
    """Token by token in float64, one sequence after the other; both models are transformers'."""
    (batch,) = heldout_batches(texts, domain, batch_size=3, sequence_length=64, max_tokens=TOKENS)
    sums, tokens = torch.zeros(4, dtype=torch.float64), 0
    for token_S, label_S, start_S in zip(batch.token_BS, batch.label_BS, batch.start_BS):
        for begin in start_S.unique().tolist():
            document = torch.nonzero(start_S == begin).flatten()
            with torch.no_grad():
                both = [model(token_S[document][None]).logits[0].double() for model in (parent, pruned)]
            for position, label in enumerate(label_S[document].tolist()):
                if label >= 0:
                    p, q = (logits[position].softmax(0) for logits in both)
                    kl = (p * (p / q).log()).sum()
                    sums += torch.stack([-p[label].log(), -q[label].log(), kl, (p.argmax() == q.argmax()).double()])
                    tokens += 1
    return tokens, (sums / tokens).tolist()


def test_figures_are_those_of_a_naive_computation(hf_model, texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    whole, stored = hf_model("olmoe")
    plan = plan_pruned(stored.config, stored.registry, KEPT)
    with durable_directory(tmp_path / "pruned") as directory:
        SubmodelWriter(stored, plan).write(directory)
    pruned = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "pruned", attn_implementation="eager", experts_implementation="eager"
    )
    for child in (unwritten_model(stored, plan), open_unfinished(tmp_path / "pruned")):
        loss = measure_domain(stored, child, texts, "ships", max_tokens=TOKENS)
        tokens, wanted = naive(whole, pruned.eval(), texts, "ships")
        assert loss.tokens == tokens and loss.domain == "ships"
        assert [loss.parent_loss, loss.pruned_loss, loss.kl, loss.agreement] == pytest.approx(wanted, rel=1e-5)
    assert loss.kl > 0.01 and loss.to_json()["perplexity_ratio"] == pytest.approx(
        loss.to_json()["pruned_perplexity"] / loss.to_json()["parent_perplexity"]
    )


def test_a_model_is_no_worse_than_itself(hf_model, texts):
    _, stored = hf_model("mixtral tied")
    loss = measure_domain(stored, stored, texts, "recipes", max_tokens=TOKENS)
    assert (loss.kl, loss.agreement) == (0.0, 1.0) and loss.parent_loss == loss.pruned_loss


def test_an_unwritten_model_has_the_tensors_that_are_written(hf_model, tmp_path):
    _, stored = hf_model("olmoe", torch.bfloat16)
    plan = plan_pruned(stored.config, stored.registry, KEPT)
    zeros = {name: torch.ones(6, dtype=torch.float64) for name in ("gate_E", "norm_E", "gate_norm_E", "easy_ep_E")}
    layer = LayerSums(tokens=9, count_E=torch.arange(1, 7), prob_EE=torch.eye(6).double(), subset_error=None, **zeros)
    plan = plan_merged(plan, [layer] * 3, tuple(((a, 3), (b,), (c,)) for a, b, c in KEPT))
    with durable_directory(tmp_path / "merged") as directory:
        SubmodelWriter(stored, plan).write(directory)
    written, unwritten = open_unfinished(tmp_path / "merged"), unwritten_model(stored, plan)
    for name, shape in expected_shapes(plan.config, plan.registry).items():
        tensor = torch.full(shape, torch.nan)
        unwritten.tensors.read_into(name, tensor)
        assert torch.equal(tensor, written.tensors.read(name).float()), name


def test_a_perplexity_beyond_all_numbers_is_none():
    figures = {"parent_loss": 1.0, "pruned_loss": 800.0, "kl": 799.0, "agreement": 0.0}
    told = PruningLoss(domain="law", tokens=3, **figures).to_json()
    assert (told["pruned_perplexity"], told["perplexity_ratio"]) == (None, None)
    assert figures.items() <= told.items() and told["parent_perplexity"] == pytest.approx(2.718281828)
    assert json.loads(encode_json(told)) == told
