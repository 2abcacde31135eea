import math

import pytest
import torch
from torch.nn import functional

from sigmoe.kernels.linear_cross_entropy import linear_cross_entropy, op
from sigmoe.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference


def labels(T, V, ignored=0.3):
    return torch.where(torch.rand(T) < ignored, -100, torch.randint(0, V, (T,)))


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """The same answers whether a chunk holds all tokens or a few."""
    if request.param == "many chunks":
        monkeypatch.setattr(op, "chunk_size", lambda V, D, device: max(200 // V, 1))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize(("T", "D", "V"), [(29, 5, 37), (1, 3, 7), (16, 8, 1), (11, 4, 250)])
@pytest.mark.usefixtures("chunks")
def test_matches_the_reference(assert_agrees, T, D, V, z_loss):
    label = labels(T, V)
    label[0] = V - 1
    assert_agrees(
        lambda x, w: linear_cross_entropy(x, w, label, z_loss=z_loss),
        lambda x, w: linear_cross_entropy_reference(x, w, label, z_loss=z_loss),
        [torch.randn(T, D), torch.randn(V, D)],
    )


@pytest.mark.usefixtures("chunks")
def test_same_as_torch():
    x, weight, label = torch.randn(29, 5), torch.randn(37, 5), labels(29, 37)
    loss_sum, loss_T = linear_cross_entropy(x, weight, label)
    want = functional.cross_entropy(x @ weight.t(), label, reduction="none")
    assert torch.allclose(loss_T, want, atol=1e-5)
    assert loss_sum.item() == pytest.approx(want.sum().item(), rel=1e-5)


def test_known_value_of_equal_logits():
    loss_sum, loss_T = linear_cross_entropy(torch.zeros(3, 2), torch.ones(8, 2), torch.tensor([0, -100, 7]), z_loss=0.5)
    assert loss_T.tolist() == pytest.approx([math.log(8), 0, math.log(8)])
    assert loss_sum.item() == pytest.approx(2 * (math.log(8) + 0.5 * math.log(8) ** 2))


@pytest.mark.parametrize("T", [0, 6])
def test_nothing_labelled(T):
    x, weight = torch.randn(T, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss_sum, loss_T = linear_cross_entropy(x, weight, torch.full((T,), -100), z_loss=0.1)
    loss_sum.backward()
    assert loss_sum.item() == 0 and torch.equal(loss_T, torch.zeros(T))
    assert torch.equal(x.grad, torch.zeros(T, 4)) and torch.equal(weight.grad, torch.zeros(9, 4))


def test_the_backward_scales():
    x, weight, label = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4), labels(9, 7)
    whole = torch.autograd.grad(linear_cross_entropy(x, weight, label)[0], x)[0]
    part = torch.autograd.grad(linear_cross_entropy(x, weight, label)[0] * 0.25, x)[0]
    assert torch.allclose(part, whole * 0.25)


def test_gradients_are_handed_out_once():
    x = torch.randn(3, 4, requires_grad=True)
    loss_sum, _ = linear_cross_entropy(x, torch.randn(7, 4), labels(3, 7))
    loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out already"):
        loss_sum.backward()


def test_extreme_logits():
    x = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    loss_sum, loss_T = linear_cross_entropy(x, torch.eye(2), torch.tensor([0, 0]))
    loss_sum.backward()
    assert loss_T.tolist() == [0, 1e4]
    assert x.grad.tolist() == [[0, 0], [-1, 1]]


def test_only_what_is_asked_for_gets_a_gradient(monkeypatch):
    label = labels(9, 7)
    for wanted in range(2):
        inputs = [torch.randn(9, 4), torch.randn(7, 4)]
        inputs[wanted].requires_grad_()
        linear_cross_entropy(*inputs, label)[0].backward()
        assert [x.grad is not None for x in inputs] == [wanted == 0, wanted == 1]

    def never(*args):
        raise AssertionError("a gradient was computed that nobody wanted")

    monkeypatch.setattr(op, "_grad_logits", never)
    with torch.no_grad():
        loss_sum, _ = linear_cross_entropy(*inputs, label)
    assert not loss_sum.requires_grad
    linear_cross_entropy(inputs[0].detach(), inputs[1].detach(), label)


def test_the_loss_of_a_token_carries_no_gradient():
    loss_sum, loss_T = linear_cross_entropy(torch.randn(3, 4, requires_grad=True), torch.randn(7, 4), labels(3, 7))
    assert loss_sum.requires_grad and not loss_T.requires_grad


@pytest.mark.usefixtures("chunks")
def test_bf16_losses_are_fp32():
    x, weight, label = torch.randn(20, 4).bfloat16(), torch.randn(33, 4).bfloat16(), labels(20, 33)
    x.requires_grad_(), weight.requires_grad_()
    loss_sum, loss_T = linear_cross_entropy(x, weight, label)
    loss_sum.backward()
    assert loss_sum.dtype == loss_T.dtype == torch.float32
    assert x.grad.dtype == weight.grad.dtype == torch.bfloat16
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    want, _ = linear_cross_entropy_reference(*exact, label)
    want.backward()
    assert loss_sum.item() == pytest.approx(want.item(), rel=1e-2)
    for got, leaf in zip((x, weight), exact):
        assert (got.grad - leaf.grad).norm() / leaf.grad.norm() < 2e-2
