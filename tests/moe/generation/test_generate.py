"""The loop: greedy is the argmax of the uncached model, rows do not touch each other, end-of-text ends them."""

import pytest
import torch

from sigmoe.moe.generation.generate import GenerationConfig, generate

DOMAINS = [1, 0, 0, 1]
GREEDY = GenerationConfig(max_tokens=8)
SAMPLED = GenerationConfig(max_tokens=8, temperature=1.0, top_p=0.9, seed=4)


def by_hand(model, prompt, domain, steps, ends=()):
    """The likeliest token of the uncached model, again and again."""
    tokens = list(prompt)
    for _ in range(steps):
        token = int(model(torch.tensor([tokens]), domain_B=torch.tensor([domain])).logits_BSV[0, -1].argmax())
        if token in ends:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("router", ["top_k", "domain_top_k", "rre"])
def test_greedy_is_the_argmax_of_the_uncached_model(build, prompts, router):
    model = build(router, sliding_window=6)
    want = [by_hand(model, prompt, domain, 8) for prompt, domain in zip(prompts, DOMAINS)]
    assert generate(model, prompts, GREEDY, domain_ids=DOMAINS) == want
    for batch in (1, 3):
        config = GenerationConfig(max_tokens=8, batch=batch)
        assert generate(model, prompts, config, domain_ids=DOMAINS) == want


def test_texts_end_where_they_end(build, prompts):
    model = build("domain_top_k")
    free = generate(model, prompts, GREEDY, domain_ids=DOMAINS)
    ends = {free[0][0], free[2][4]}
    heard = [[] for _ in prompts]
    got = generate(
        model,
        prompts,
        GREEDY,
        domain_ids=DOMAINS,
        end_of_text=ends,
        padding=36,
        on_token=lambda row, token: heard[row].append(token),
    )
    want = [by_hand(model, prompt, domain, 8, ends) for prompt, domain in zip(prompts, DOMAINS)]
    assert got == heard == want
    assert got[0] == []
    assert {len(tokens) for tokens in got} > {0}


def test_the_loop_ends_when_all_texts_have(build, prompts):
    model = build("top_k")
    everything = range(37)
    assert generate(model, prompts, GenerationConfig(max_tokens=10**9), end_of_text=everything) == [[]] * 4


def test_samples_do_not_depend_on_the_batch(build, prompts):
    model = build("top_k")
    together = generate(model, prompts, SAMPLED)
    assert generate(model, prompts, SAMPLED) == together
    assert generate(model, prompts[:2], SAMPLED) == together[:2]
    one_by_one = GenerationConfig(max_tokens=8, temperature=1.0, top_p=0.9, seed=4, batch=1)
    assert generate(model, prompts, one_by_one) == together
    other_seed = GenerationConfig(max_tokens=8, temperature=1.0, top_p=0.9, seed=5)
    assert generate(model, prompts, other_seed) != together


def test_equal_prompts_are_sampled_differently(build, prompts):
    texts = generate(build("top_k"), [prompts[0]] * 4, SAMPLED)
    assert len({tuple(text) for text in texts}) > 1


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 2 is empty"),
        ([[37]], "prompt 1 has a token outside the model's vocabulary of 37"),
        ([[-1]], "prompt 1 has a token outside"),
    ],
)
def test_mistakes_are_named(build, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(build("top_k"), prompts, GREEDY)


def test_a_domain_is_asked_for(build):
    with pytest.raises(ValueError, match="give domain=, one of a, b"):
        generate(build("rre"), [[1]], GREEDY)


@pytest.mark.parametrize("changes", [{"max_tokens": 0}, {"batch": 0}, {"top_p": 2.0}])
def test_settings_are_checked(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        GenerationConfig(**changes)
