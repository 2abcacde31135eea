"""Decoding, a submodel gives the full model's bits."""

import pytest
import torch

from sigmoe.moe.cache import KeyValueCache
from sigmoe.moe.canonical import canonical_tensors
from sigmoe.moe.config import RouterConfig
from sigmoe.moe.extract import plan_submodel
from sigmoe.moe.generation.generate import GenerationConfig, generate, left_padded
from sigmoe.moe.model import Transformer

SETS = {"disjoint": {"a": 3, "b": 5}, "overlapping": {"a": (0, 1, 2), "b": (0, 2, 3, 4)}, "of one": {"a": 1, "b": 1}}
# Widths of no whole cache line: an expert lies aligned differently in the submodel's stack. And widths of whole ones.
SHAPES = {"odd": {}, "aligned": {"dim": 32, "expert_dim": 48, "ffn_dim": 16, "head_dim": 16}}


def cut_out(full, name):
    plan = plan_submodel(full.config, full.registry, [name])
    sub, source = Transformer(plan.config, plan.registry).requires_grad_(False), canonical_tensors(full)
    for key, target in canonical_tensors(sub).items():
        piece = plan.pieces[key]
        target.copy_(source[piece.source] if piece.rows is None else source[piece.source][list(piece.rows)])
    return sub


def logits(model, prompts, domain, steps):
    """The logits of every step of decoding, always the likeliest token next."""
    domain_B = torch.full((len(prompts),), domain)
    cache = KeyValueCache(model.config, batch=len(prompts), capacity=30)
    token_BS, start_BS = left_padded(prompts, 0)
    found = [model.extend(token_BS, cache, start_BS=start_BS, domain_B=domain_B)]
    for _ in range(steps):
        found.append(model.extend(found[-1].argmax(-1, keepdim=True), cache, domain_B=domain_B))
    return torch.stack(found)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("router", ["domain_top_k", "rre"])
def test_same_bits(build, prompts, router, sets, shape):
    fixed = {"top_k": 1, "balance": "none"} if router == "rre" else {"top_k": 1 if sets == "of one" else 2}
    config = RouterConfig(name=router, sets=SETS[sets], **fixed)
    full = build(config, embedding_slots={"b": 1}, sliding_window=9, **shape)
    for domain, name in enumerate(("a", "b")):
        sub = cut_out(full, name)
        for rows in (prompts, prompts[:1], prompts[1:3]):
            assert torch.equal(logits(full, rows, domain, 6), logits(sub, rows, 0, 6))


@pytest.mark.parametrize("sets", SETS)
def test_same_bits_when_packed(build, prompts, sets):
    config = RouterConfig(name="domain_top_k", sets=SETS[sets], top_k=1 if sets == "of one" else 2)
    for domain, name in enumerate(("a", "b")):
        full = build(config)
        sub = cut_out(full, name)
        full.pack()
        sub.pack()
        for rows in (prompts, prompts[:1]):
            assert torch.equal(logits(full, rows, domain, 6), logits(sub, rows, 0, 6))


def test_same_texts_when_sampled(build, prompts):
    full = build("domain_top_k")
    config = GenerationConfig(temperature=1.0, max_tokens=12, seed=3)
    whole = generate(full, prompts, config, domain_ids=[1] * 4, end_of_text=[5, 9])
    assert whole == generate(cut_out(full, "b"), prompts, config, domain_ids=[0] * 4, end_of_text=[5, 9])
    assert whole != generate(full, prompts, config, domain_ids=[0] * 4, end_of_text=[5, 9])
