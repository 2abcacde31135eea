import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from sigmoe.kernels.attention import Sight, attention, cached_attention  # noqa: E402
from sigmoe.kernels.attention.reference import attention_reference  # noqa: E402
from sigmoe.kernels.attention.triton_tiles import count_up_to  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter


def inputs(device, B, S, H, G, C=16):
    return [torch.randn(B, S, heads, C, device=device) for heads in (H, G, G)]


def starts(device, B, S, *begins):
    """Documents that begin at `begins` in the first sequence; in each further one a place later."""
    start = torch.zeros(B, S, dtype=torch.int64)
    for b in range(B):
        for begin in begins:
            start[b, begin + b :] = begin + b
    return start.to(device)


def assert_attention_agrees(assert_agrees, inputs, start, tolerance=1e-5, **options):
    assert_agrees(
        lambda q, k, v: attention(q, k, v, start, backend="triton", **options),
        lambda q, k, v: attention_reference(q, k, v, start, **options),
        inputs,
        tolerance,
    )


# Interpreted, blocks are of 16 queries and 16 keys: whole blocks without a mask, with one, and skipped ones.
@pytest.mark.parametrize("window", [None, 3, 16, 37, 1000])
@pytest.mark.parametrize("begins", [(), (5, 21), (32,), (3, 4, 5, 6, 50)])
def test_documents_and_windows(assert_agrees, device, begins, window):
    assert_attention_agrees(assert_agrees, inputs(device, 1, 67, 1, 1), starts(device, 1, 67, *begins), window=window)


@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize(("B", "S"), [(2, 2), (1, 16), (1, 33)])
def test_groups_and_lengths(assert_agrees, device, B, S, G):
    assert_attention_agrees(assert_agrees, inputs(device, B, S, 4, G), starts(device, B, S, 1, 15), scale=0.3)


@pytest.mark.parametrize("C", [1, 24, 64, 96, 128, 256])
def test_widths(assert_agrees, device, C):
    assert_attention_agrees(assert_agrees, inputs(device, 1, 35, 2, 1, C), starts(device, 1, 35, 9))


def test_a_long_sequence(assert_agrees, device):
    # Where a document ends is looked up in two steps of 256 places.
    start = starts(device, 1, 300, 40, 200, 290)
    assert_attention_agrees(assert_agrees, inputs(device, 1, 300, 1, 1), start, window=30)


@pytest.mark.parametrize(("length", "window"), [(1, None), (20, None), (20, 1)])
def test_one_token_to_see(device, length, window):
    # Documents of one token, or a window of one: the output is the value itself, and no score has a gradient.
    q, k, v = (x.requires_grad_() for x in inputs(device, 2, length, 2, 1))
    start = torch.arange(length, device=device).expand(2, -1) if window is None else starts(device, 2, length)
    out = attention(q, k, v, start, window=window, backend="triton")
    torch.testing.assert_close(out, v.expand(-1, -1, 2, -1))
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    assert grads[0].abs().max() < 1e-5 and grads[1].abs().max() < 1e-5
    torch.testing.assert_close(grads[2], grad.sum(2, keepdim=True))


@triton.jit
def look_up(start, value, out, S, BLOCK: tl.constexpr):
    tl.store(out + tl.program_id(0), count_up_to(start, tl.load(value + tl.program_id(0)), S, BLOCK))


def test_where_numbers_that_never_fall_pass_a_value(device):
    # In groups of 4 numbers, 16 of them at a time.
    start = torch.tensor([0] * 7 + [7] * 9 + [16] * 24 + [40] * 9, device=device)
    value = torch.tensor([-1, 0, 6, 7, 15, 16, 40, 48], device=device)
    out = torch.full_like(value, -1)
    look_up[(8,)](start, value, out, 49, BLOCK=4)
    assert out.tolist() == [0, 7, 7, 16, 16, 40, 49, 49]


def test_queries_that_see_nothing(device):
    # Their documents begin behind them: 0, and no gradient.
    q, k, v = (x.requires_grad_() for x in inputs(device, 1, 40, 2, 1))
    start = torch.full((1, 40), 20, device=device)
    out = attention(q, k, v, start, backend="triton")
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert (out[:, :20] == 0).all() and (out[:, 20:] != 0).all()
    alone = attention(q[:, 20:], k[:, 20:], v[:, 20:], torch.zeros(1, 20, dtype=torch.int64, device=device))
    torch.testing.assert_close(out[:, 20:], alone)
    for grad, want in zip(grads, torch.autograd.grad(alone.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("B", "S"), [(0, 5), (2, 0)])
def test_no_tokens(device, B, S):
    leaves = [x.requires_grad_() for x in inputs(device, B, S, 2, 1)]
    out = attention(*leaves, torch.zeros(B, S, dtype=torch.int64, device=device), backend="triton")
    out.sum().backward()
    assert out.shape == (B, S, 2, 16) and all(x.grad.shape == x.shape for x in leaves)


def test_slices_of_one_projection(assert_agrees, device):
    start = starts(device, 2, 20, 7)

    def split(x):
        return x[:, :, :2], x[:, :, 2:3], x[:, :, 3:]

    assert_agrees(
        lambda x: attention(*split(x), start, backend="triton"),
        lambda x: attention_reference(*split(x), start),
        [torch.randn(2, 20, 4, 16, device=device)],
    )


def test_strides_do_not_matter(device):
    start, plain = starts(device, 2, 20, 7), inputs(device, 2, 20, 2, 1)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    width_first = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in plain]
    results = []
    for leaves in (plain, heads_first, width_first):
        leaves = [x.requires_grad_() for x in leaves]
        out = attention(*leaves, start, backend="triton")
        grad = out.detach().transpose(1, 2).contiguous().transpose(1, 2)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[0], results[2]))


def test_large_scores_do_not_overflow(device):
    q, k, v = (x.mul(100).requires_grad_() for x in inputs(device, 1, 40, 2, 2))
    out = attention(q, k, v, torch.zeros(1, 40, dtype=torch.int64, device=device), backend="triton")
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.isfinite().all() and all(grad.isfinite().all() for grad in grads)


def test_parts_of_a_group(device):
    # A group of query heads is summed in parts where there are few blocks of keys, and at once where there are many.
    from sigmoe.kernels.attention.triton import _parts

    programs = 1, 42, 43, 128, 200, 300, 511, 512, 9999
    assert [_parts(one, 12, 512) for one in programs] == [12, 12, 12, 4, 3, 2, 2, 1, 1]
    assert _parts(1, 1, 512) == 1


def test_nothing_but_a_row_is_kept(device):
    B, S, H, G, C = 2, 20, 4, 2, 16
    kept = {}

    def keep(x):
        kept[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        leaves = [x.requires_grad_() for x in inputs(device, B, S, H, G, C)]
        attention(*leaves, starts(device, B, S, 7), backend="triton")
    # What came in, the output, and a number by row and head; the documents.
    assert sum(x.numel() for x in kept.values()) == B * S * (2 * H + 2 * G) * C + B * S * H + B * S


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("C", [64, 96, 128, 256])
@pytest.mark.parametrize(("G", "window"), [(1, None), (4, 100), (16, None)])
@pytest.mark.usefixtures("floats")
def test_half_precision(device, dtype, C, G, window):
    S = 1111
    start = starts(device, 2, S, 300, 301, 700)
    leaves = [x.to(dtype).requires_grad_() for x in inputs(device, 2, S, 16, G, C)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    grad = torch.randn(2, S, 16, C, device=device).to(dtype)

    def results(function, leaves, **options):
        out = function(*leaves, start, window=window, **options)
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    want = results(attention_reference, wide)
    eager = results(attention_reference, leaves)
    got = results(attention, leaves, backend="triton")
    for place, (one, other, exact) in enumerate(zip(got, eager, want, strict=True)):
        error, eager_error = (float((x.double() - exact).norm() / exact.norm()) for x in (one, other))
        assert error < (1e-2 if place else 5e-3) and error < 1.5 * eager_error
    assert all(map(torch.equal, got, results(attention, leaves, backend="triton")))


def test_what_it_cannot_do_is_refused(device):
    start = torch.zeros(1, 3, dtype=torch.int64, device=device)
    for q, k, v, scale in (
        (*(x.double() for x in inputs(device, 1, 3, 2, 1)), None),
        (*inputs(device, 1, 3, 2, 1, 272), None),
        (*inputs(device, 1, 3, 2, 1), 0.0),
    ):
        with pytest.raises(ValueError, match="use kernels=torch"):
            attention(q, k, v, start, scale=scale, backend="triton")


def test_the_operators_keep_torchs_rules(device):
    from sigmoe.kernels.attention.triton import attention_forward, attention_over_cache

    q, k, v = (x.requires_grad_() for x in inputs(device, 1, 5, 2, 1))
    start = starts(device, 1, 5, 3)
    torch.library.opcheck(attention_forward, (q, k, v, start, 4, 0.3))
    kept_k, kept_v = (x.detach().transpose(1, 2) for x in (k, v))
    torch.library.opcheck(attention_over_cache, (q.detach()[:, -2:], kept_k, kept_v, start[:, -2:], 0, None))


def kept(x_BSGC, first):
    """Keys or values as a cache hands them out: a part of a larger tensor."""
    B, S, G, C = x_BSGC.shape
    whole_BGJC = torch.full((B, G, S + 5, C), torch.nan, device=x_BSGC.device)
    whole_BGJC[:, :, :S] = x_BSGC.transpose(1, 2)
    return whole_BGJC[:, :, first:S]


def over_cache(q, k, v, start, num_new, window, backend):
    S = q.shape[1]
    first = 0 if window is None else max(0, S - num_new - window + 1)
    sight = Sight(start_BS=start[:, -num_new:], first=first, num_keys=S - first, window=window, dtype=q.dtype)
    return cached_attention(q[:, -num_new:], kept(k, first), kept(v, first), sight, backend=backend)


@pytest.mark.parametrize("window", [None, 1, 20, 100])
@pytest.mark.parametrize("num_new", [1, 3])
@pytest.mark.parametrize("G", [1, 3])
def test_new_tokens_over_kept_ones(device, G, num_new, window):
    # Interpreted, 150 keys are three parts of 64.
    q, k, v = inputs(device, 1, 150, 6, G, 24)
    start = starts(device, 1, 150, 9, 60)
    want = attention_reference(*(x.double() for x in (q, k, v)), start, window=window)[:, -num_new:]
    got = over_cache(q, k, v, start, num_new, window, "triton")
    assert (got - want).norm() / want.norm() < 1e-5
    assert torch.equal(got, over_cache(q, k, v, start, num_new, window, "triton"))


def test_new_tokens_that_fill_several_blocks(device):
    q, k, v = inputs(device, 1, 90, 4, 1)
    start = starts(device, 1, 90, 30, 70)
    want = attention_reference(*(x.double() for x in (q, k, v)), start)[:, -40:]
    assert (over_cache(q, k, v, start, 40, None, "triton") - want).norm() / want.norm() < 1e-5


def test_new_tokens_that_see_nothing(device):
    q, k, v = inputs(device, 1, 80, 2, 1)
    start = torch.tensor([[79] * 78 + [90, 79]], device=device)
    got = over_cache(q, k, v, start, 2, None, "triton")
    assert (got[:, 0] == 0).all()
    torch.testing.assert_close(got[:, 1], v[:, 79].expand(-1, 2, -1))


@pytest.mark.parametrize(("B", "num_new"), [(0, 1), (2, 0)])
def test_no_new_tokens(device, B, num_new):
    q, k = torch.randn(B, num_new, 2, 16, device=device), torch.randn(B, 1, 7, 16, device=device)
    start = torch.zeros(B, num_new, dtype=torch.int64, device=device)
    sight = Sight(start_BS=start, first=0, num_keys=7, window=None, dtype=torch.float32)
    assert cached_attention(q, k, k, sight, backend="triton").shape == q.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("G", "num_new"), [(1, 1), (2, 5), (16, 1)])
@pytest.mark.usefixtures("floats")
def test_new_tokens_in_half_precision(device, dtype, G, num_new):
    q, k, v = (x.to(dtype) for x in inputs(device, 2, 5000, 16, G, 128))
    start = starts(device, 2, 5000, 1000)
    want = attention_reference(*(x.double() for x in (q, k, v)), start)[:, -num_new:]
    got = over_cache(q, k, v, start, num_new, None, "triton")
    assert (got.double() - want).norm() / want.norm() < 5e-3
