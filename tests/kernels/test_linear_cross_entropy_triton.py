import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional

from sigmoe.kernels.linear_cross_entropy import linear_cross_entropy, op
from sigmoe.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

# Tokens, D, V: nothing, one token; fewer columns than a block, a block and a column, several blocks.
SIZES = [(0, 4, 7), (1, 3, 7), (16, 8, 1), (29, 5, 65), (11, 4, 250)]

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # of the interpreter


@pytest.fixture(autouse=True)
def triton():
    pytest.importorskip("triton")


def cut(monkeypatch, size):
    monkeypatch.setattr(op, "chunk_size", lambda V, D, device: size)


def labels(device, T, V, ignored=0.3):
    label = torch.where(torch.rand(T) < ignored, -100, torch.randint(0, V, (T,)))
    label[:1] = V - 1
    return label.to(device)


def leaves(*inputs):
    return [x.clone().requires_grad_() for x in inputs]


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize(("T", "D", "V"), SIZES)
@pytest.mark.parametrize("chunk", [1024, 5])
def test_matches_the_reference(assert_agrees, device, monkeypatch, T, D, V, z_loss, chunk):
    cut(monkeypatch, chunk)
    label = labels(device, T, V)
    assert_agrees(
        lambda x, w: linear_cross_entropy(x, w, label, z_loss=z_loss, backend="triton"),
        lambda x, w: linear_cross_entropy_reference(x, w, label, z_loss=z_loss),
        [torch.randn(T, D, device=device), torch.randn(V, D, device=device)],
    )


def test_extreme_logits(device):
    x, weight = leaves(torch.tensor([[1e4, 0.0], [0.0, 1e4]], device=device), torch.eye(2, device=device))
    loss_sum, loss_T = linear_cross_entropy(x, weight, torch.zeros(2, device=device).long(), backend="triton")
    loss_sum.backward()
    assert loss_T.tolist() == [0, 1e4]
    assert x.grad.tolist() == [[0, 0], [-1, 1]]


def test_what_is_not_a_number_is_seen(device):
    x, weight = leaves(torch.randn(3, 4, device=device), torch.randn(70, 4, device=device))
    x.data[1, 2] = float("nan")
    loss_sum, loss_T = linear_cross_entropy(x, weight, torch.tensor([3, 5, 69], device=device), backend="triton")
    loss_sum.backward()
    assert loss_T.isnan().tolist() == [False, True, False] and x.grad[1].isnan().all()
    assert x.grad[::2].isfinite().all()


def test_a_token_without_label_has_no_gradient_whatever_its_logits(device):
    x, weight = leaves(torch.randn(2, 4, device=device), torch.randn(7, 4, device=device))
    x.data[0] = float("inf")
    linear_cross_entropy(x, weight, torch.tensor([-100, 2], device=device), z_loss=0.1, backend="triton")[0].backward()
    assert torch.equal(x.grad[0], torch.zeros(4, device=device)) and x.grad[1].isfinite().all()


def test_only_what_is_asked_for_gets_a_gradient(device, monkeypatch):
    from sigmoe.kernels.linear_cross_entropy import triton as kernels

    label = labels(device, 9, 7)
    for wanted in range(2):
        inputs = [torch.randn(9, 4, device=device), torch.randn(7, 4, device=device)]
        inputs[wanted].requires_grad_()
        linear_cross_entropy(*inputs, label, backend="triton")[0].backward()
        assert [x.grad is not None for x in inputs] == [wanted == 0, wanted == 1]

    def never(*args):
        raise AssertionError("a gradient was computed that nobody wanted")

    monkeypatch.setattr(kernels, "logits_gradient_", never)
    with torch.no_grad():
        loss_sum, _ = linear_cross_entropy(*inputs, label, backend="triton")
    assert not loss_sum.requires_grad


class Shard:
    """One of several threads that hold columns; like a process group's, its reductions write over what they get."""

    def __init__(self, barrier, given, holder, first, num_columns):
        self.barrier, self.given, self.holder = barrier, given, holder
        self.first, self.num_columns = first, num_columns

    def reduce(self, x, combine):
        self.given[self.holder] = x.clone()
        self.barrier.wait()
        x.copy_(combine(torch.stack(self.given)))
        self.barrier.wait()
        return x

    def maximum(self, x_N):
        return self.reduce(x_N, lambda x: x.amax(0))

    def total(self, x_N):
        return self.reduce(x_N, lambda x: x.sum(0))


@pytest.fixture
def one_kernel_at_a_time(monkeypatch):
    """Triton's interpreter is not for threads."""
    from sigmoe.kernels.linear_cross_entropy import triton as kernels

    lock = threading.Lock()

    def guarded(kernel):
        def launch(*args):
            with lock:
                return kernel(*args)

        return launch

    for name in ("softmax_sums", "logits_gradient_"):
        monkeypatch.setattr(kernels, name, guarded(getattr(kernels, name)))


@pytest.mark.usefixtures("one_kernel_at_a_time")
@pytest.mark.parametrize("chunk", [1024, 5])
def test_holders_together_equal_one(device, monkeypatch, chunk):
    cut(monkeypatch, chunk)
    V, T, ends, z_loss = 29, 12, [10, 29, 29], 0.3  # the last has no column
    x_TD, weight_VD, label_T = torch.randn(T, 5, device=device), torch.randn(V, 5, device=device), labels(device, T, V)
    exact = leaves(x_TD.double(), weight_VD.double())
    want_sum, want_T = linear_cross_entropy_reference(*exact, label_T, z_loss=z_loss)
    want_sum.backward()
    begins, barrier, given = [0, *ends[:-1]], threading.Barrier(len(ends), timeout=20), [None] * len(ends)

    def run(holder):
        x, weight = leaves(x_TD, weight_VD[begins[holder] : ends[holder]])
        shard = Shard(barrier, given, holder, begins[holder], 19)
        found_sum, found_T = linear_cross_entropy(x, weight, label_T, z_loss=z_loss, shard=shard, backend="triton")
        found_sum.backward()
        return found_sum.detach(), found_T, x.grad, weight.grad

    with ThreadPoolExecutor(len(ends)) as pool:
        results = list(pool.map(run, range(len(ends))))
    for found_sum, found_T, _, _ in results:
        torch.testing.assert_close(found_sum.double(), want_sum.detach(), rtol=1e-6, atol=0)
        torch.testing.assert_close(found_T.double(), want_T, rtol=1e-5, atol=1e-5)
    for found, leaf in zip((sum(each[2] for each in results), torch.cat([each[3] for each in results])), exact):
        assert (found - leaf.grad).norm() / leaf.grad.norm() < 1e-5


def test_fp64_is_refused(device):
    x, weight = torch.randn(3, 4, device=device).double(), torch.randn(7, 4, device=device).double()
    with pytest.raises(ValueError, match="use kernels=torch"):
        linear_cross_entropy(x, weight, labels(device, 3, 7), backend="triton")


def test_the_operators_keep_torchs_rules(device):
    from sigmoe.kernels.linear_cross_entropy.triton import logits_gradient_, softmax_sums

    logits, lse, label = torch.randn(3, 7, device=device), torch.randn(3, device=device), labels(device, 3, 7)
    torch.library.opcheck(softmax_sums, (logits, label))
    torch.library.opcheck(logits_gradient_, (logits, lse, label, label, 0.1))


def test_torch_compile_comes_to_the_same(device):
    def loss(x, weight):
        return linear_cross_entropy(x.sin(), weight, label, z_loss=0.1, backend="triton")[0] * 2

    label = labels(device, 9, 7)
    inputs = leaves(torch.randn(9, 4, device=device), torch.randn(7, 4, device=device))
    compiled = torch.compile(loss, backend="aot_eager")
    got, want = (torch.autograd.grad(function(*inputs), inputs) for function in (compiled, loss))
    assert all(map(torch.equal, got, want))


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "D", "V"), [(300, 128, 4099), (2500, 64, 1000)])  # one chunk, three
def test_half_precision_is_as_good_as_eager(device, dtype, T, D, V):
    def eager(x, weight):
        return functional.cross_entropy(x @ weight.t(), label, reduction="sum")

    label = labels(device, T, V)
    inputs = [torch.randn(T, D, device=device).to(dtype), (torch.randn(V, D, device=device) / D**0.5).to(dtype)]
    exact, ours, theirs = leaves(*(x.double() for x in inputs)), leaves(*inputs), leaves(*inputs)
    want, want_T = linear_cross_entropy_reference(*exact, label)
    found, found_T = linear_cross_entropy(*ours, label, backend="triton")
    for loss in (want, found, eager(*theirs)):
        loss.backward()
    assert (found_T - want_T).norm() / want_T.norm() < 5e-3
    for leaf, one, other in zip(exact, ours, theirs):
        error, allowed = ((x.grad - leaf.grad).norm() / leaf.grad.norm() for x in (one, other))
        assert error < 1e-2 and error < 1.5 * allowed
