"""Cached logits are the uncached ones."""

import pytest
import torch

from sigmoe.moe.cache import KeyValueCache
from sigmoe.moe.generation.generate import left_padded

VARIANTS = {
    "plain": {},
    "window": {"sliding_window": 5},
    "window of one": {"sliding_window": 1},
    "norm of heads": {"qk_norm": "head"},
    "norm of the width": {"qk_norm": "width", "sliding_window": 3},
    "one kv head": {"num_kv_heads": 1},
    "as many kv heads": {"num_kv_heads": 6, "tie_embeddings": True},
    "all sparse": {"sparse_layers": "all"},
    "all dense": {"sparse_layers": "none"},
    # Widths of whole cache lines, where single rows take another product.
    "aligned": {"dim": 32, "expert_dim": 16, "head_dim": 16, "ffn_dim": 48},
}
DOMAINS = torch.tensor([1, 0, 0, 1])


def relative(ours, truth):
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


def alone(model, tokens, domain):
    """The last token's logits, without a cache."""
    return model(torch.tensor([tokens]), domain_B=domain[None]).logits_BSV[0, -1]


def assert_cached_is_uncached(model, prompts, domain_B, pieces):
    torch.manual_seed(4)
    rows = [list(prompt) for prompt in prompts]
    cache = KeyValueCache(model.config, batch=len(rows), capacity=max(map(len, rows)) + sum(pieces))
    token_BS, start_BS = left_padded(rows, 7)
    logits_BV = model.extend(token_BS, cache, start_BS=start_BS, domain_B=domain_B)
    for piece in (*pieces, 0):
        for row, tokens in enumerate(rows):
            assert relative(logits_BV[row], alone(model, tokens, domain_B[row])) < 1e-5
        if piece:
            token_BS = torch.randint(37, (len(rows), piece))
            rows = [tokens + more for tokens, more in zip(rows, token_BS.tolist())]
            logits_BV = model.extend(token_BS, cache, domain_B=domain_B)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("router", ["top_k", "bias", "domain_top_k", "rre"])
def test_a_token_at_a_time(build, prompts, router, changes):
    model = build(router, **changes)
    assert_cached_is_uncached(model, prompts, DOMAINS, (1,) * 6)
    assert_cached_is_uncached(model, prompts[:1], DOMAINS[:1], (1, 1))


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}], ids=str)
def test_several_tokens_at_a_time(build, prompts, changes):
    assert_cached_is_uncached(build("domain_top_k", **changes), prompts, DOMAINS, (3, 1, 20))


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_slots(build, prompts, tied):
    model = build("domain_top_k", embedding_slots={"b": 1}, tie_embeddings=tied)
    assert_cached_is_uncached(model, prompts, DOMAINS, (1, 1))


def test_a_document_after_another(build):
    model, domain_B = build("top_k"), torch.tensor([0])
    tokens = torch.arange(12)[None]
    cache = KeyValueCache(model.config, batch=1, capacity=13)
    model.extend(tokens, cache, start_BS=torch.tensor([[0] * 7 + [7] * 5]))
    got = model.extend(torch.tensor([[3]]), cache)
    assert relative(got[0], alone(model, [7, 8, 9, 10, 11, 3], domain_B[0])) < 1e-5
    model.extend(torch.tensor([[4]]), cache, start_BS=torch.tensor([[13]]))
    got = model.extend(torch.tensor([[5]]), cache)
    assert relative(got[0], alone(model, [4, 5], domain_B[0])) < 1e-5
    got = model.extend(torch.tensor([[6]]), cache, start_BS=torch.tensor([[15]]))
    assert relative(got[0], alone(model, [6], domain_B[0])) < 1e-5


def test_a_buffer_of_starts_may_be_filled_again(build):
    model, start_B1 = build("top_k"), torch.zeros(1, 1, dtype=torch.int64)
    cache = KeyValueCache(model.config, batch=1, capacity=4)
    for token in (3, 4):
        model.extend(torch.tensor([[token]]), cache, start_BS=start_B1)
    start_B1.fill_(2)
    model.extend(torch.tensor([[5]]), cache, start_BS=start_B1)
    start_B1.fill_(0)
    got = model.extend(torch.tensor([[6]]), cache)
    assert relative(got[0], alone(model, [5, 6], DOMAINS[0])) < 1e-5


def test_another_batch_than_the_caches_is_an_error(build):
    model = build("top_k")
    cache = KeyValueCache(model.config, batch=2, capacity=4)
    with pytest.raises(AssertionError, match="another batch"):
        model.extend(torch.tensor([[3]]), cache, start_BS=torch.tensor([[0]]))


def test_memory_is_taken_layer_by_layer(build):
    cache = KeyValueCache(build("top_k").config, batch=2, capacity=4)
    for change in (lambda: None, lambda: cache.reserve(5), lambda: cache.keep(torch.tensor([1]))):
        change()
        layers = [cache.stored(layer, 0, 1)[0] for layer in range(cache.config.num_layers)]
        assert len({layer.untyped_storage().data_ptr() for layer in layers}) == len(layers) > 1


def test_kept_rows_go_on_alone(build, prompts):
    model = build("rre")
    cache = KeyValueCache(model.config, batch=4, capacity=30)
    token_BS, start_BS = left_padded(prompts, 7)
    model.extend(token_BS, cache, start_BS=start_BS, domain_B=DOMAINS)
    kept = torch.tensor([3, 1])
    cache.keep(kept)
    for token in (5, 6):
        logits_BV = model.extend(torch.full((2, 1), token), cache, domain_B=DOMAINS[kept])
    for row, prompt in enumerate(kept.tolist()):
        assert relative(logits_BV[row], alone(model, [*prompts[prompt], 5, 6], DOMAINS[prompt])) < 1e-5


def test_bf16_stays_bf16(build):
    model = build("top_k").bfloat16()
    cache = KeyValueCache(model.config, batch=2, capacity=9, dtype=torch.bfloat16)
    tokens = torch.arange(16).view(2, 8)
    model.extend(tokens, cache)
    got = model.extend(torch.tensor([[1], [2]]), cache)
    want = model(torch.cat([tokens, torch.tensor([[1], [2]])], 1)).logits_BSV[:, -1]
    assert got.dtype == torch.bfloat16
    assert relative(got, want) < 0.05


def test_no_gradients(build):
    model = build("top_k").requires_grad_()
    cache = KeyValueCache(model.config, batch=1, capacity=3)
    assert not model.extend(torch.tensor([[1, 2]]), cache).requires_grad
    assert not model.extend(torch.tensor([[1]]), cache).requires_grad


def test_mistakes_are_named(build):
    model = build("domain_top_k")
    cache = KeyValueCache(model.config, batch=1, capacity=3)
    with pytest.raises(ValueError, match="give domain=, one of a, b"):
        model.extend(torch.tensor([[1]]), cache)
    with pytest.raises(ValueError, match="domain id 2 is not one of this model's 2"):
        model.extend(torch.tensor([[1]]), cache, domain_B=torch.tensor([2]))
    assert cache.length == 0


def test_a_full_cache_grows(build, prompts):
    model = build("domain_top_k")
    cache = KeyValueCache(model.config, batch=1, capacity=1)
    tokens = prompts[2]
    for token in tokens:
        logits_BV = model.extend(torch.tensor([[token]]), cache, domain_B=DOMAINS[:1])
    assert relative(logits_BV[0], alone(model, tokens, DOMAINS[0])) < 1e-5
    assert cache.capacity == 32
