"""The domain under which a prompt is likeliest, against one plain forward pass a prompt and domain."""

import pytest
import torch

from sigmoe.moe import domain_choice
from sigmoe.moe.config import ModelConfig, RouterConfig
from sigmoe.moe.domain_choice import choose_domains, domain_scores
from sigmoe.moe.initialize import initialize
from sigmoe.moe.model import Transformer
from sigmoe.moe.route_table import fill_route_tables

NAMES = ("a", "b", "c")
ROUTERS = {
    "domain_top_k": RouterConfig(name="domain_top_k", sets={"a": 2, "b": 3, "c": 2}),
    "rre": RouterConfig(name="rre", sets=3, top_k=1, balance="none"),
    "top_k": RouterConfig(name="top_k", num_experts=4),
}


def build(router="domain_top_k", **changes):
    shape = {"vocab_size": 53, "dim": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "expert_dim": 20}
    config = ModelConfig(**{**shape, "init_std": 0.4, "router": ROUTERS[router], **changes})
    model = Transformer(config, config.build_registry(NAMES))
    initialize(model, 0)
    fill_route_tables(model, {name: torch.arange(53) for name in NAMES}, 0)
    return model.requires_grad_(False)


def prompts(*lengths):
    torch.manual_seed(0)
    return [torch.randint(53, (length,)).tolist() for length in lengths]


def plainly(model, prompt, domain):
    logits_BSV = model(torch.tensor([prompt]), domain_B=torch.tensor([domain])).logits_BSV
    log_prob_SV = logits_BSV[0, :-1].double().log_softmax(-1)
    return float(log_prob_SV.gather(1, torch.tensor(prompt[1:])[:, None]).mean())


@pytest.mark.parametrize(
    ("router", "changes"),
    [("domain_top_k", {}), ("rre", {}), ("domain_top_k", {"embedding_slots": {"b": 1}, "sliding_window": 3})],
    ids=["domain_top_k", "rre", "slots and window"],
)
def test_scores_are_mean_log_probabilities(router, changes):
    model, given = build(router, **changes), prompts(9, 2, 31, 5)
    score_PN = domain_scores(model, given)
    assert (score_PN.shape, score_PN.dtype) == ((4, 3), torch.float32)
    expected = torch.tensor([[plainly(model, prompt, domain) for domain in range(3)] for prompt in given])
    assert torch.allclose(score_PN, expected, rtol=1e-5, atol=1e-6)
    assert (score_PN.std(1) > 1e-3).all()
    assert choose_domains(model, given) == expected.argmax(1).tolist()
    assert len(set(choose_domains(model, prompts(*[4] * 20)))) > 1


def test_mates_in_the_batch_do_not_matter():
    model, given = build(), prompts(7, 40, 3, 19, 7)
    alone = torch.cat([domain_scores(model, [prompt]) for prompt in given])
    assert torch.allclose(domain_scores(model, given), alone, rtol=1e-5, atol=1e-6)


def test_small_batches_give_the_same(monkeypatch):
    model, given = build(), prompts(7, 40, 3, 19, 7)
    whole, sizes = domain_scores(model, given), []
    model.register_forward_pre_hook(lambda _, arguments: sizes.append(tuple(arguments[0].shape)))
    monkeypatch.setattr(domain_choice, "_MOST_TOKENS", 40)
    assert torch.allclose(domain_scores(model, given), whole, rtol=1e-5, atol=1e-6)
    assert len(sizes) > 5
    assert all(rows * length <= 40 for rows, length in sizes)
    assert sum(rows for rows, _ in sizes) == 15


def test_what_cannot_tell_takes_the_lowest_id():
    assert domain_scores(build(), prompts(1, 6))[0].tolist() == [0, 0, 0]
    assert choose_domains(build(), prompts(1)) == [0]
    assert choose_domains(build("top_k"), prompts(8, 3)) == [0, 0]
    assert domain_scores(build(), []).shape == (0, 3)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match=r"prompt 1 has no tokens, so it cannot choose a domain: give domain="):
        domain_scores(build(), [[3, 4], []])
