import pytest
import torch

from sigmoe.kernels.attention import Sight, attention, cached_attention
from sigmoe.kernels.attention.reference import attention_reference


def inputs(B, S, H, G, C=6):
    return [torch.randn(B, S, H, C), torch.randn(B, S, G, C), torch.randn(B, S, G, C)]


def kept(x_BSGC, first):
    """Keys or values as a cache hands them out: a part of a larger tensor."""
    B, S, G, C = x_BSGC.shape
    whole_BGJC = torch.full((B, G, S + 5, C), torch.nan)
    whole_BGJC[:, :, :S] = x_BSGC.transpose(1, 2)
    return whole_BGJC[:, :, first:S]


def sight(start, first, num_keys, window, dtype=torch.float32):
    return Sight(start_BS=start, first=first, num_keys=num_keys, window=window, dtype=dtype)


@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize("num_new", [1, 3, 20])
@pytest.mark.parametrize("G", [1, 3, 6])
def test_the_last_tokens_see_what_they_see_in_the_whole(G, num_new, window):
    q, k, v = inputs(3, 20, 6, G)
    start = torch.zeros(3, 20, dtype=torch.int64)
    start[1, 7:], start[2, 18:] = 7, 18
    want = attention_reference(*(x.double() for x in (q, k, v)), start, window=window)[:, -num_new:]
    first = 0 if window is None else max(0, 20 - num_new - window + 1)
    seen = sight(start[:, -num_new:], first, 20 - first, window)
    got = cached_attention(q[:, -num_new:], kept(k, first), kept(v, first), seen)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    full = attention(q, k, v, start, window=window)[:, -num_new:]
    torch.testing.assert_close(got, full, rtol=1e-5, atol=1e-6)


def test_no_bias_where_nothing_is_hidden():
    start = torch.tensor([[2], [3]])
    assert sight(start, 3, 5, None).bias_B1SJ is None
    assert sight(start, 3, 5, 5).bias_B1SJ is None
    assert sight(start, 3, 5, 4).bias_B1SJ is not None
    assert sight(start, 2, 6, None).bias_B1SJ is not None
    bias = sight(torch.tensor([[0, 1]]), 0, 3, None, torch.bfloat16).bias_B1SJ
    assert bias.dtype == torch.bfloat16
    assert (bias == 0).tolist() == [[[[True, True, False], [False, True, True]]]]
