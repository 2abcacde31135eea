"""Comparison of an operation with its float64 reference, shared by the tests of this folder."""

from collections.abc import Callable, Iterator

import pytest
import torch

TOLERANCE = 1e-5

Function = Callable[..., object]


def _tensors(output: object) -> list[torch.Tensor]:
    return [x for x in (output if isinstance(output, tuple) else (output,)) if isinstance(x, torch.Tensor)]


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-12)) if want.numel() else 0.0


def _run(function: Function, inputs: list[torch.Tensor], seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs, and the gradients of every input under random output gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = _tensors(function(*leaves))
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64)
    for out in outputs:
        if out.requires_grad:
            weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            loss = loss + (out * weight.to(out.device)).sum().cpu()
    return [out.detach() for out in outputs], list(torch.autograd.grad(loss, leaves))


@pytest.fixture
def assert_agrees() -> Callable[[Function, Function, list[torch.Tensor]], None]:
    """Assert that outputs and every input's gradient agree with the reference, and come out the same bits twice."""

    def check(op: Function, reference: Function, inputs: list[torch.Tensor], tolerance: float = TOLERANCE) -> None:
        outputs, grads = _run(op, inputs, seed=1)
        want_outputs, want_grads = _run(reference, [x.double() for x in inputs], seed=1)
        for got, want in zip(outputs + grads, want_outputs + want_grads, strict=True):
            if want.is_floating_point():
                assert _error(got, want) < tolerance
            else:
                assert torch.equal(got, want)
        again_outputs, again_grads = _run(op, inputs, seed=1)
        for first, second in zip(outputs + grads, again_outputs + again_grads, strict=True):
            assert torch.equal(first, second)

    return check


@pytest.fixture
def assert_as_good_as() -> Callable[[Function, Function, Function, list[torch.Tensor]], None]:
    """Assert that an operation on half-precision inputs is near its reference, and not far behind another's error."""

    def check(op: Function, other: Function, reference: Function, inputs: list[torch.Tensor]) -> None:
        got, again, theirs = _run(op, inputs, seed=1), _run(op, inputs, seed=1), _run(other, inputs, seed=1)
        want = _run(reference, [x.double() for x in inputs], seed=1)
        for part, bound in enumerate((5e-3, 1e-2)):
            for one, same, peer, exact in zip(got[part], again[part], theirs[part], want[part], strict=True):
                assert one.dtype == inputs[0].dtype
                assert _error(one, exact) < min(bound, 1.5 * _error(peer, exact))
                assert torch.equal(one, same)

    return check


@pytest.fixture
def device() -> torch.device:
    """Where Triton's kernels run: on a GPU, or interpreted on a CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def floats(device: torch.device) -> None:
    """Skip a test of half-precision rows where there is no GPU."""
    if device.type != "cuda":
        pytest.skip("needs a GPU: Triton's interpreter computes wrongly in bf16")


@pytest.fixture(autouse=True)
def strict_torch() -> Iterator[None]:
    """A fixed seed, and torch's strict mode: operations without a fixed order raise, and empty tensors hold NaN."""
    torch.manual_seed(7)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
