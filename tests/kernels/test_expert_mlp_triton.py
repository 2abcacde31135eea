import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sigmoe.kernels.expert_mlp import expert_mlp, moe_mlp
from sigmoe.kernels.expert_mlp.reference import expert_mlp_reference, moe_mlp_reference
from sigmoe.kernels.positions import positions

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Tokens, top-k, D, F: nothing, one token, blocks of rows and columns that are full, and that are not.
SIZES = [(0, 2, 16, 16), (1, 1, 16, 48), (1, 8, 16, 16), (5, 2, 80, 16), (9, 1, 48, 80), (17, 2, 16, 16)]


@pytest.fixture(autouse=True)
def triton():
    pytest.importorskip("triton")


def routing(device, num_tokens, top_k, num_experts=9, capacity=None, backend="torch"):
    """Experts drawn without repetition; the last two get nothing where that leaves enough."""
    busy = max(num_experts - 2, top_k)
    expert = torch.rand(1, num_tokens, busy).argsort(-1)[..., :top_k].to(device)
    limits = None if capacity is None else torch.tensor([capacity]).to(device)
    return positions(expert, num_experts, capacity_B=limits, backend=backend)


def layer(device, T, K, D, F, E=9):
    shapes = (T, D), (T, K), (E, 2 * F, D), (E, D, F)
    return [torch.randn(shape, device=device) for shape in shapes]


def assert_layer_agrees(assert_agrees, where, inputs, tolerance=1e-5):
    assert_agrees(
        lambda x, w, gate_up, down: moe_mlp(x, w, where, gate_up, down, backend="triton"),
        lambda x, w, gate_up, down: moe_mlp_reference(x, w, where, gate_up, down),
        inputs,
        tolerance,
    )


def assert_rows_agree(assert_agrees, count, inputs, tolerance=1e-5):
    assert_agrees(
        lambda x, gate_up, down: expert_mlp(x, count, gate_up, down, backend="triton"),
        lambda x, gate_up, down: expert_mlp_reference(x, count, gate_up, down),
        inputs,
        tolerance,
    )


@pytest.mark.parametrize(("T", "K", "D", "F"), SIZES)
def test_the_layer_matches_the_reference(assert_agrees, device, T, K, D, F):
    assert_layer_agrees(assert_agrees, routing(device, T, K), layer(device, T, K, D, F))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("capacity", [0, 1, 3])
def test_dropped_pairs(assert_agrees, device, capacity, backend):
    # Triton's order does not say how many rows there are: the rows that are none must not be looked at.
    where = routing(device, 6, 2, num_experts=4, capacity=capacity, backend=backend)
    assert where.source_R.numel() < 12 and where.has_tail is (backend == "triton")
    assert_layer_agrees(assert_agrees, where, layer(device, 6, 2, 16, 16, E=4))


class Waits(TorchDispatchMode):
    """Notes every word that the host asks the device for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("capacity", [None, 1])
def test_the_host_waits_for_nothing(device, capacity):
    inputs = [x.requires_grad_() for x in layer(device, 6, 2, 16, 16, E=4)]
    with Waits() as waits:
        where = routing(device, 6, 2, num_experts=4, capacity=capacity, backend="triton")
        out = moe_mlp(*inputs[:2], where, *inputs[2:], backend="triton")
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert waits.found == []
    with waits:
        assert where.source_R.numel() <= 12
    assert len(waits.found) == (capacity is not None)


def test_all_tokens_to_one_expert(assert_agrees, device):
    where = positions(torch.full((1, 19, 1), 4, device=device), 7)
    assert_layer_agrees(assert_agrees, where, layer(device, 19, 1, 16, 16, E=7))


@pytest.mark.parametrize("counts", [[3, 1, 0, 7, 2, 0, 4], [0, 0, 33, 0, 0, 0, 0], [0] * 7, [1], [16, 17]])
def test_rows_match_the_reference(assert_agrees, device, counts):
    count, E = torch.tensor(counts, device=device), len(counts)
    shapes = (sum(counts), 16), (E, 32, 16), (E, 16, 16)
    assert_rows_agree(assert_agrees, count, [torch.randn(shape, device=device) for shape in shapes])


def test_strides_do_not_matter(device):
    where, inputs = routing(device, 5, 2), layer(device, 5, 2, 16, 16)
    plain, strided = ([x.clone() for x in inputs] for _ in range(2))
    strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in strided]
    assert not any(x.is_contiguous() for x in strided)
    results = []
    for leaves in (plain, strided):
        leaves = [x.requires_grad_() for x in leaves]
        out = moe_mlp(*leaves[:2], where, *leaves[2:], backend="triton")
        results.append([out, *torch.autograd.grad(out, leaves, out.detach().t().contiguous().t())])
    assert all(map(torch.equal, *results))


def test_one_program_works_off_many_tiles(assert_agrees, device):
    # More blocks of rows than neighbours that take turns, and several columns: every place in the list is met.
    count = torch.tensor([70, 0, 90], device=device)
    shapes = (160, 16), (3, 96, 16), (3, 16, 48)
    assert_rows_agree(assert_agrees, count, [torch.randn(shape, device=device) for shape in shapes])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("D", "F"), [(256, 384), (144, 400)])
@pytest.mark.usefixtures("floats")
def test_half_precision(assert_agrees, device, dtype, D, F):
    where, (x, weight, gate_up, down) = routing(device, 1000, 4), layer(device, 1000, 4, D, F)
    halves = [x.to(dtype), weight.softmax(-1), (gate_up / D**0.5).to(dtype), (down / F**0.5).to(dtype)]
    assert_layer_agrees(assert_agrees, where, halves, TOLERANCE[dtype])
    rows = torch.randn(4000, D, device=device).to(dtype)
    assert_rows_agree(assert_agrees, where.count_E, [rows, *halves[2:]], TOLERANCE[dtype])


def test_an_empty_expert_gets_a_zero_gradient(device):
    count = torch.tensor([0, 3, 0], device=device)
    rows, gate_up, down = (torch.randn(s, device=device) for s in ((3, 16), (3, 32, 16), (3, 16, 16)))
    gate_up.requires_grad_(), down.requires_grad_()
    expert_mlp(rows, count, gate_up, down, backend="triton").sum().backward()
    for grad in (gate_up.grad, down.grad):
        assert (grad[[0, 2]] == 0).all() and (grad[1] != 0).any()


def test_only_what_is_asked_for_gets_a_gradient(device):
    where = routing(device, 3, 2)
    whole = [x.requires_grad_() for x in layer(device, 3, 2, 16, 16)]
    moe_mlp(*whole[:2], where, *whole[2:], backend="triton").sum().backward()
    for wanted in range(4):
        inputs = [x.detach().requires_grad_(place == wanted) for place, x in enumerate(whole)]
        moe_mlp(*inputs[:2], where, *inputs[2:], backend="triton").sum().backward()
        assert [x.grad is not None for x in inputs] == [place == wanted for place in range(4)]
        assert torch.equal(inputs[wanted].grad, whole[wanted].grad)
    with torch.no_grad():
        assert not moe_mlp(*whole[:2], where, *whole[2:], backend="triton").requires_grad


def test_nothing_of_rows_by_width_is_kept(device):
    T, K, D, F = 12, 2, 64, 16
    where, inputs = routing(device, T, K), layer(device, T, K, D, F)
    kept = {}

    def keep(x):
        kept[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        moe_mlp(*(x.requires_grad_() for x in inputs[:2]), where, *inputs[2:], backend="triton")
    weights = {x.data_ptr() for x in inputs[2:]}
    ids = [x for x in kept.values() if not x.is_floating_point()]
    floats = [x for address, x in kept.items() if x.is_floating_point() and address not in weights]
    # What came in and the pre-activation, and by row: its place, its pair and its weight.
    assert sum(x.numel() for x in floats) == T * D + T * K * 2 * F + T * K
    assert sum(x.numel() for x in ids) == 2 * T * K + where.count_E.numel()


@pytest.mark.parametrize(
    ("D", "F", "named"), [(24, 16, "D as a multiple of 16, not 24"), (16, 40, "F as a multiple of 16, not 40")]
)
def test_dimensions_that_do_not_fit_are_refused(device, D, F, named):
    where, inputs = routing(device, 3, 2), layer(device, 3, 2, D, F)
    with pytest.raises(ValueError, match=named):
        moe_mlp(*inputs[:2], where, *inputs[2:], backend="triton")


def test_other_dtypes_are_refused(device):
    where, inputs = routing(device, 3, 2), layer(device, 3, 2, 16, 16)
    for x, gate_up in ((inputs[0].double(), inputs[2].double()), (inputs[0].bfloat16(), inputs[2])):
        with pytest.raises(ValueError, match=r"throughout, not .*: use kernels=torch"):
            moe_mlp(x, inputs[1], where, gate_up, inputs[3].to(gate_up.dtype), backend="triton")


def test_torchs_layer_matches_the_reference(assert_agrees, device):
    for capacity in (None, 1):
        where = routing(device, 5, 2, capacity=capacity)
        assert_agrees(
            lambda x, w, gate_up, down, where=where: moe_mlp(x, w, where, gate_up, down),
            lambda x, w, gate_up, down, where=where: moe_mlp_reference(x, w, where, gate_up, down),
            layer(device, 5, 2, 7, 5),
        )


def test_the_operator_keeps_torchs_rules(device):
    from sigmoe.kernels.expert_mlp.triton import expert_mlp_forward

    where = routing(device, 3, 2, num_experts=4)
    x, weight, gate_up, down = (x.requires_grad_() for x in layer(device, 3, 2, 16, 16, E=4))
    arguments = weight, where.row_TK, where.source_N, where.count_E, gate_up, down
    torch.library.opcheck(expert_mlp_forward, (x, *arguments))
