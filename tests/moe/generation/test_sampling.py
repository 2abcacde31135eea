"""The next token: the distribution is the stated one, and a draw depends on its key alone."""

import dataclasses

import pytest
import torch

from sigmoe.moe.generation.sampling import SamplingConfig, kept_probabilities, next_tokens

CONFIGS = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 3},
    {"temperature": 1.0, "top_k": 100},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 1.5, "top_p": 0.01},
    {"temperature": 1.0, "top_k": 4, "top_p": 0.8},
]


def reference(logits_V, config):
    """Probabilities by sorting and adding in plain Python."""
    weights = [(float(x) / config.temperature, -token) for token, x in enumerate(logits_V.double())]
    order = sorted(range(len(weights)), key=lambda token: weights[token], reverse=True)[: config.top_k]
    total = sum(torch.tensor(weights[token][0], dtype=torch.float64).exp().item() for token in order)
    kept, below = {}, 0.0
    for token in order:
        share = torch.tensor(weights[token][0], dtype=torch.float64).exp().item() / total
        if below < (config.top_p or 2):
            kept[token] = share
        below += share
    return [kept.get(token, 0.0) / sum(kept.values()) for token in range(len(weights))]


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_kept_probabilities(changes):
    torch.manual_seed(0)
    config = SamplingConfig(**changes)
    logits_BV = torch.randn(5, 12) * 2
    logits_BV[0] = 0.0  # ties go to the lower id
    prob_BV, token_BV = kept_probabilities(logits_BV, config)
    if token_BV is not None:
        prob_BV = torch.zeros_like(prob_BV).scatter_(-1, token_BV, prob_BV)
    got_BV = prob_BV / prob_BV.sum(-1, keepdim=True)
    want_BV = torch.tensor([reference(row, config) for row in logits_BV], dtype=torch.float64)
    torch.testing.assert_close(got_BV, want_BV, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_tokens_come_as_often_as_they_should(changes):
    torch.manual_seed(1)
    draws, config = 20_000, SamplingConfig(**changes, seed=7)
    logits_V = torch.randn(9) * 2
    token_B = next_tokens(logits_V.expand(draws, -1), config, torch.arange(draws), 0)
    share_V = token_B.bincount(minlength=9) / draws
    want_V = torch.tensor(reference(logits_V, config))
    assert (share_V[want_V == 0] == 0).all()
    assert ((share_V - want_V).abs() < 4 * (want_V * (1 - want_V) / draws).sqrt() + 1e-9).all()


def test_greedy_is_the_largest_and_the_lower_id():
    logits_BV = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    assert next_tokens(logits_BV, SamplingConfig(seed=5), torch.arange(2), 9).tolist() == [1, 0]


@pytest.mark.parametrize("changes", [{"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-9}])
def test_one_token_left_is_the_greedy_one(changes):
    torch.manual_seed(2)
    logits_BV = torch.randn(50, 30)
    token_B = next_tokens(logits_BV, SamplingConfig(**changes), torch.arange(50), 0)
    assert torch.equal(token_B, logits_BV.argmax(-1))


def test_a_draw_depends_on_seed_row_and_position_alone():
    torch.manual_seed(3)
    config = SamplingConfig(temperature=1.0, seed=1)
    logits_BV, row_B = torch.zeros(64, 1000), torch.arange(64)
    token_B = next_tokens(logits_BV, config, row_B, 2)
    some = torch.tensor([40, 3, 17])
    assert torch.equal(next_tokens(logits_BV[:3], config, row_B[some], 2), token_B[some])
    assert len(set(token_B.tolist())) > 50
    for other in (dataclasses.replace(config, seed=2), config):
        position = 2 if other != config else 3
        assert (next_tokens(logits_BV, other, row_B, position) != token_B).sum() > 50


def test_impossible_tokens_never_come():
    logits_BV = torch.full((4096, 5), -torch.inf)
    logits_BV[:, 2] = 0.0
    for changes in ({}, {"top_k": 3}, {"top_p": 0.5}):
        config = SamplingConfig(temperature=1.0, **changes)
        assert (next_tokens(logits_BV, config, torch.arange(4096), 0) == 2).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p must lie in \(0, 1\]"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**changes)
