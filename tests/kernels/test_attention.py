import pytest
import torch
from torch.nn import functional

from sigmoe.kernels.attention import attention
from sigmoe.kernels.attention.reference import attention_reference


def inputs(B, S, H, G, C=6):
    return [torch.randn(B, S, H, C), torch.randn(B, S, G, C), torch.randn(B, S, G, C)]


def starts(B, S, chance):
    """Documents that begin at random places, differently in every sequence."""
    begins = torch.rand(B, S) < chance
    return torch.where(begins, torch.arange(S), 0).cummax(1).values


@pytest.mark.parametrize("window", [None, 1, 3, 64, 100, 1000])
@pytest.mark.parametrize("chance", [0.0, 0.05, 1.0])
def test_matches_the_reference(assert_agrees, chance, window):
    # Two full blocks of queries and a part of one; a chance of 1 makes documents of length 1.
    start = starts(2, 150, chance)
    assert_agrees(
        lambda q, k, v: attention(q, k, v, start, window=window),
        lambda q, k, v: attention_reference(q, k, v, start, window=window),
        inputs(2, 150, 4, 2),
    )


@pytest.mark.parametrize("G", [1, 2, 3, 6])
@pytest.mark.parametrize("S", [1, 2, 63, 65])
def test_groups_and_lengths(assert_agrees, S, G):
    start = starts(3, S, 0.1)
    assert_agrees(
        lambda q, k, v: attention(q, k, v, start, scale=0.3),
        lambda q, k, v: attention_reference(q, k, v, start, scale=0.3),
        inputs(3, S, 6, G, C=5),
    )


@pytest.mark.parametrize(("B", "S"), [(0, 5), (2, 0)])
def test_no_tokens(B, S):
    leaves = [x.requires_grad_() for x in inputs(B, S, 2, 1)]
    out = attention(*leaves, torch.zeros(B, S, dtype=torch.long))
    out.sum().backward()
    assert out.shape == (B, S, 2, 6) and all(x.grad.shape == x.shape for x in leaves)


def test_same_as_scaled_dot_product_attention():
    q, k, v = inputs(2, 70, 4, 2)
    want = functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    got = attention(q, k, v, torch.zeros(2, 70, dtype=torch.long))
    assert torch.allclose(got, want.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("window", [None, 2])
def test_what_a_query_can_see(window):
    # Uniform scores: the output is the mean of the visible keys' values, here their positions.
    S, start = 6, torch.tensor([[0, 0, 0, 3, 3, 3]])
    value = torch.arange(S, dtype=torch.float32).view(1, S, 1, 1).expand(1, S, 1, 2)
    out = attention(torch.zeros(1, S, 1, 2), torch.zeros(1, S, 1, 2), value, start, window=window)
    want = [0, 0.5, 1, 3, 3.5, 4] if window is None else [0, 0.5, 1.5, 3, 3.5, 4.5]
    assert out[0, :, 0, 0].tolist() == pytest.approx(want)


def test_documents_do_not_touch():
    q, k, v = (x.requires_grad_() for x in inputs(1, 90, 2, 1))
    start = torch.tensor([[0] * 40 + [40] * 50])
    attention(q, k, v, start)[:, 40:].sum().backward()
    for x in (q, k, v):
        assert (x.grad[:, :40] == 0).all() and (x.grad[:, 40:] != 0).any()


def test_a_document_is_the_same_alone():
    q, k, v = inputs(1, 90, 2, 1)
    start = torch.tensor([[0] * 40 + [40] * 50])
    alone = attention(q[:, 40:], k[:, 40:], v[:, 40:], torch.zeros(1, 50, dtype=torch.long))
    assert torch.allclose(attention(q, k, v, start)[:, 40:], alone, atol=1e-6)


def test_large_scores_do_not_overflow():
    q, k, v = (x.mul(100).requires_grad_() for x in inputs(1, 70, 2, 2))
    out = attention(q, k, v, torch.zeros(1, 70, dtype=torch.long))
    out.sum().backward()
    assert out.isfinite().all() and all(x.grad.isfinite().all() for x in (q, k, v))


def test_slices_of_one_projection(assert_agrees):
    start = starts(2, 10, 0.2)

    def split(x):
        return x[:, :, :4], x[:, :, 4:6], x[:, :, 6:]

    assert_agrees(
        lambda x: attention(*split(x), start),
        lambda x: attention_reference(*split(x), start),
        [torch.randn(2, 10, 8, 6)],
    )


def test_inputs_are_left_alone():
    leaves = inputs(2, 70, 2, 2)
    copies = [x.clone() for x in leaves]
    attention(*(x.requires_grad_() for x in leaves), torch.zeros(2, 70, dtype=torch.long)).sum().backward()
    for x, copy in zip(leaves, copies):
        assert torch.equal(x, copy)


def test_no_grad_and_fixed_keys():
    q, k, v = inputs(1, 5, 2, 1)
    attention(q.requires_grad_(), k, v, torch.zeros(1, 5, dtype=torch.long)).sum().backward()
    assert q.grad is not None and k.grad is None
    with torch.no_grad():
        assert not attention(q, k, v, torch.zeros(1, 5, dtype=torch.long)).requires_grad


def test_bf16_scores_are_fp32():
    q, k, v = (x.bfloat16().requires_grad_() for x in inputs(2, 9, 4, 2))
    start = starts(2, 9, 0.2)
    out = attention(q, k, v, start)
    out.sum().backward()
    assert out.dtype == q.grad.dtype == torch.bfloat16
    assert torch.equal(out, attention(q.float(), k.float(), v.float(), start).bfloat16())


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="2 does not divide 3"):
        attention(*inputs(1, 4, 3, 2), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="window must be at least 1"):
        attention(*inputs(1, 4, 2, 2), torch.zeros(1, 4, dtype=torch.long), window=0)
