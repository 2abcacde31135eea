import pytest
import torch

from sigmoe.kernels.gate import gate, table_gate
from sigmoe.kernels.gate.reference import gate_reference

# (shape, top_k): one token, several tiles and partial sums, an expert too many for a power of two, as many choices as
# experts.
SIZES = [((1, 1, 1), 1), ((1, 1, 7), 2), ((2, 71, 7), 2), ((3, 9, 7), 1), ((2, 9, 7), 7), ((1, 13, 128), 8)]


pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter


@pytest.fixture(autouse=True)
def triton():
    pytest.importorskip("triton")


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("shape", "top_k"), SIZES)
def test_matches_the_reference(assert_agrees, device, shape, top_k, renormalize):
    assert_agrees(
        lambda x: gate(x, top_k, renormalize=renormalize, backend="triton"),
        lambda x: gate_reference(x, top_k, renormalize=renormalize),
        [torch.randn(shape, device=device) * 2],
    )


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("top_k", [2, 3])
def test_bias_only_selects(assert_agrees, device, top_k, renormalize):
    bias = torch.randn(7, device=device)
    assert_agrees(
        lambda x: gate(x, top_k, bias_E=bias, renormalize=renormalize, backend="triton"),
        lambda x: gate_reference(x, top_k, bias_E=bias.double(), renormalize=renormalize),
        [torch.randn(2, 5, 7, device=device)],
    )


def test_strides_do_not_matter(assert_agrees, device):
    bias = torch.randn(7, 2, device=device)[:, 1]
    assert_agrees(
        lambda x: tuple(out.mT for out in gate(x.mT, 2, bias_E=bias, backend="triton")[:2]),
        lambda x: tuple(out.mT for out in gate_reference(x.mT, 2, bias_E=bias.double())[:2]),
        [torch.randn(2, 7, 5, device=device)],
    )


@pytest.mark.parametrize("field", ["weight_BSK", "prob_BE", "z_B"])
def test_gradient_of_one_output_alone(assert_agrees, device, field):
    assert_agrees(
        lambda x: getattr(gate(x, 2, backend="triton"), field),
        lambda x: getattr(gate_reference(x, 2), field),
        [torch.randn(2, 5, 7, device=device)],
    )


def test_all_tokens_to_one_expert(assert_agrees, device):
    logits = torch.randn(2, 9, 7, device=device)
    logits[..., 5] += 30
    assert_agrees(lambda x: gate(x, 1, backend="triton"), lambda x: gate_reference(x, 1), [logits])


@pytest.mark.parametrize("shape", [(0, 3, 7), (2, 0, 7)])
def test_no_tokens(assert_agrees, device, shape):
    logits = torch.randn(shape, device=device)
    assert_agrees(lambda x: gate(x, 2, backend="triton"), lambda x: gate_reference(x, 2), [logits])


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("forbidden", [False, True])
def test_ties_go_to_the_lower_expert(device, top_k, forbidden):
    logits = torch.randint(-1, 2, (1, 40, 7), device=device).float()
    bias = torch.tensor([0.0, -float("inf"), 0.0, 0.0, 0.0, 0.25, 0.0], device=device) if forbidden else None
    got, want = (gate(logits, top_k, bias_E=bias, backend=backend) for backend in ("triton", "torch"))
    assert torch.equal(got.expert_BSK, want.expert_BSK)
    assert torch.equal(got.count_BE, want.count_BE)


@pytest.mark.parametrize("top_k", [2, 3])
def test_extreme_logits_stay_finite(device, top_k):
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], device=device, requires_grad=True)
    chosen = gate(logits, top_k, backend="triton")
    (chosen.weight_BSK.sum() + chosen.prob_BE.sum() + chosen.z_B.sum()).backward()
    assert logits.grad.isfinite().all() and chosen.weight_BSK.isfinite().all()
    assert torch.equal(chosen.expert_BSK, gate(logits, top_k).expert_BSK)


def test_choices_among_nan_are_experts(device):
    logits = torch.full((1, 3, 7), float("nan"), device=device)
    assert gate(logits, 2, backend="triton").expert_BSK.tolist() == [[[0, 1]] * 3]
    assert gate(logits, 3, backend="triton").expert_BSK.tolist() == [[[0, 1, 2]] * 3]


def test_what_it_cannot_do_is_refused(device):
    for logits, top_k in (
        (torch.zeros(1, 1, 20), 17),
        (torch.zeros(1, 1, 4097), 2),
        (torch.zeros(1, 1, 4).double(), 2),
    ):
        with pytest.raises(ValueError, match="use kernels=torch"):
            gate(logits.to(device), top_k, backend="triton")


def test_the_operators_keep_torchs_rules(device):
    from sigmoe.kernels.gate.triton import gate_forward, table_gate_forward

    logits = torch.randn(2, 3, 7, device=device, requires_grad=True)
    # Not the check of ahead-of-time tracing, which adds integers and floats in place (torch 2.13).
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(gate_forward, (logits, None, 2, True), test_utils=checks)
    token, domain = torch.randint(0, 9, (2, 5), device=device), torch.tensor([1, 0], device=device)
    table, sets = (
        torch.zeros(2, 9, dtype=torch.int32, device=device),
        torch.zeros(2, 3, dtype=torch.int64, device=device),
    )
    torch.library.opcheck(table_gate_forward, (token, domain, table, sets, 4))


@pytest.mark.parametrize("length", [0, 1, 37])
def test_table_gate_matches_torch(device, length):
    sets = torch.tensor([[0, 2, 4, 0], [1, 3, 5, 6]], device=device)
    table = torch.stack([torch.randint(0, 3, (11,)), torch.randint(0, 4, (11,))]).int().to(device)
    token, domain = torch.randint(0, 11, (3, length), device=device), torch.tensor([1, 9, 0, 9, 1], device=device)[::2]
    got, want = (table_gate(token, domain, table, sets, 8, backend=backend) for backend in ("triton", "torch"))
    for field, one, other in zip(got._fields, got, want):
        assert torch.equal(one, other) and one.dtype == other.dtype, field
    for b, s in [(b, s) for b in range(3) for s in range(length)]:
        assert got.expert_BSK[b, s, 0] == sets[domain[b], table[domain[b], token[b, s]].long()]
    assert got.count_BE.sum(1).tolist() == [length] * 3
