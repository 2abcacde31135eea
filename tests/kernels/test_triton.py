"""What the Triton kernels share."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from sigmoe.kernels.gate import gate  # noqa: E402
from sigmoe.kernels.permute import combine, permute  # noqa: E402
from sigmoe.kernels.positions import positions  # noqa: E402
from sigmoe.kernels.triton import offset, tuned  # noqa: E402


@triton.jit
def offsets(row, out, stride, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(out + place, offset(tl.load(row + place), stride))
    tl.store(out + N, offset(tl.program_id(0) + 70_000, stride))


def test_addresses_beyond_two_to_the_31_elements(device):
    row = torch.tensor([0, 1, 65_536, 2**31 - 1], dtype=torch.int32, device=device)
    out = torch.zeros(5, dtype=torch.int64, device=device)
    offsets[(1,)](row, out, 40_000, N=4)
    assert out.tolist() == [0, 40_000, 65_536 * 40_000, (2**31 - 1) * 40_000, 70_000 * 40_000]


def test_tuning_takes_one_configuration_in_the_interpreter(device):
    if device.type == "cuda":
        pytest.skip("the interpreter is for machines without a GPU")
    configs = [triton.Config({"N": 4}), triton.Config({"N": 8})]
    kernel = tuned(configs, key=["stride"])(offsets)
    assert kernel.configs == configs[:1]
    row, out = torch.arange(4, dtype=torch.int32), torch.zeros(5, dtype=torch.int64)
    kernel[(1,)](row, out, 3)
    assert out.tolist() == [0, 3, 6, 9, 210_000]


def test_torch_compile_takes_all_as_one_graph(device):
    def layer(x_TD, logits_BSE):
        chosen = gate(logits_BSE, 2, backend="triton")
        where = positions(chosen.expert_BSK, 7, backend="triton")
        rows = permute(x_TD, where, 2, backend="triton").sin()
        out = combine(rows, chosen.weight_BSK.flatten(0, 1), where, backend="triton")
        return out.square().sum() + chosen.prob_BE.square().sum() + chosen.z_B.sum()

    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in ((6, 8), (2, 3, 7))]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(function(*inputs), inputs) for function in (compiled, layer))
    assert all(map(torch.equal, got, want))
