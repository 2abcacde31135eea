import pytest
import torch

from sigmoe.kernels.rope import rope, rotation
from sigmoe.kernels.rope.reference import rope_reference

THETA, EPS = 10000.0, 1e-5
# Nothing, one token, heads and halves of heads that are no powers of two, several groups of heads, the widest head.
SHAPES = [(2, 0, 3, 4), (1, 1, 1, 2), (2, 5, 3, 6), (1, 3, 5, 96), (1, 2, 1, 256)]
NORMS = ["none", "head", "width"]


pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter


@pytest.fixture(autouse=True)
def triton():
    pytest.importorskip("triton")


def positions(device, B, S):
    return torch.randint(0, 500, (B, S), device=device)


def weights(device, norm, H, C):
    """A list of none or one."""
    return {"none": [], "head": [torch.randn(C)], "width": [torch.randn(H * C)]}[norm]


def both(position, backend="triton"):
    """The operation and its reference, of x and, where it is given, the norm's weight."""

    def op(x, w=None):
        return rope(x, position, THETA, norm_weight=w, eps=EPS, backend=backend)

    def reference(x, w=None):
        return rope_reference(x, position, THETA, norm_weight=w, eps=EPS)

    return op, reference


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(assert_agrees, device, shape, norm):
    inputs = [torch.randn(shape), *weights(device, norm, *shape[2:])]
    assert_agrees(*both(positions(device, *shape[:2])), [x.to(device) for x in inputs])


@pytest.mark.parametrize("norm", NORMS)
def test_views_and_gradients_that_do_not_lie_side_by_side(assert_agrees, device, norm):
    op, reference = both(positions(device, 5, 2).t())
    inputs = [torch.randn(5, 2, 4, 12), *weights(device, norm, 3, 6)]

    def through(function):
        # Heads of a wider projection, sequence after position; and every other element of the rotated ones is used.
        return lambda x, *w: function(x.transpose(0, 1)[:, :, 1:, 6:], *w).transpose(1, 2).flatten(2)[..., ::2]

    assert_agrees(through(op), through(reference), [x.to(device) for x in inputs])


@pytest.mark.parametrize("norm", NORMS)
def test_heads_of_every_other_element(assert_agrees, device, norm):
    op, reference = both(positions(device, 2, 3))
    inputs = [torch.randn(2, 3, 2, 8), *weights(device, norm, 2, 4)]
    assert_agrees(
        lambda x, *w: op(x[..., ::2], *w), lambda x, *w: reference(x[..., ::2], *w), [x.to(device) for x in inputs]
    )


def test_angles_are_as_good_as_torchs(device):
    # Far from 0, and beside multiples of a quarter turn. Exact: the fp32 angle in fp64.
    position = torch.cat([torch.randint(0, 2**17, (20,)), 2**20 - torch.arange(10), torch.tensor([710, 355, 2**30])])
    position = position[None].to(device)
    x = torch.randn(1, position.shape[1], 1, 64, device=device)
    frequency = THETA ** (torch.arange(0, 64, 2, dtype=torch.float32, device=device) / -64)
    angle = (position[..., None] * frequency)[:, :, None].double()
    first, second = x.double().chunk(2, -1)
    exact = torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)
    errors = {
        backend: float((rope(x, position, THETA, backend=backend) - exact).abs().max())
        for backend in ("torch", "triton")
    }
    assert errors["triton"] < max(2 * errors["torch"], 1e-6), errors
    assert torch.equal(rotation(position, THETA, 64, x.dtype)[0], angle.float().cos())


def test_position_zero_is_the_identity(device):
    x = torch.randn(2, 3, 2, 8, device=device)
    assert torch.equal(rope(x, torch.zeros(2, 3, dtype=torch.int32, device=device), THETA, backend="triton"), x)


@pytest.mark.parametrize("norm", NORMS)
def test_only_what_is_asked_for_gets_a_gradient(device, norm):
    op, _ = both(positions(device, 2, 3))
    whole = [x.to(device).requires_grad_() for x in (torch.randn(2, 3, 2, 4), *weights(device, norm, 2, 4))]
    op(*whole).square().sum().backward()
    for wanted in range(len(whole)):
        inputs = [x.detach().requires_grad_(place == wanted) for place, x in enumerate(whole)]
        op(*inputs).square().sum().backward()
        assert [x.grad is not None for x in inputs] == [place == wanted for place in range(len(whole))]
        assert torch.equal(inputs[wanted].grad, whole[wanted].grad)
    with torch.no_grad():
        assert not op(*whole).requires_grad


@pytest.mark.parametrize(("norm", "kept"), [("none", 0), ("head", 24 + 6 + 2), ("width", 24 + 3 + 4)])
def test_what_is_kept(device, norm, kept):
    # Positions and frequencies; with a norm its input, a number a norm and the weight: nothing of angles.
    op, _ = both(positions(device, 1, 3))
    x, *w = [x.to(device).requires_grad_() for x in (torch.randn(1, 3, 2, 4), *weights(device, norm, 2, 4))]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        op(x, *w)
    # Three positions, two frequencies, and of a head's norm four weights in place of two.
    assert sum(saved) == 3 + 2 + kept + {"none": 0, "head": 2, "width": 4}[norm]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.usefixtures("floats")
def test_half_precision(assert_as_good_as, device, dtype, norm):
    position = positions(device, 2, 300)
    op, reference = both(position)
    inputs = [torch.randn(2, 300, 12, 96), *weights(device, norm, 12, 96)]
    inputs = [x.to(device, dtype) for x in inputs]
    assert_as_good_as(op, both(position, "torch")[0], reference, inputs)


def test_mistakes_are_named(device):
    x, position = torch.randn(1, 2, 3, 4, device=device), torch.zeros(1, 2, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match="even"):
        rope(x[..., :3], position, THETA, backend="triton")
    with pytest.raises(ValueError, match="norm_weight must have 4"):
        rope(x, position, THETA, norm_weight=torch.ones(5), backend="triton")
    wide = torch.zeros(1, 2, 33, 256, device=device)
    for refused, weight in (
        (x.double(), None),
        (torch.zeros(1, 2, 1, 258, device=device), None),
        (wide, wide[0, 0].flatten()),
    ):
        with pytest.raises(ValueError, match="use kernels=torch"):
            rope(refused, position, THETA, norm_weight=weight, backend="triton")


@pytest.mark.parametrize("norm", NORMS)
def test_the_operator_keeps_torchs_rules(device, norm):
    from sigmoe.kernels.rope.triton import rope_forward

    x, *w = [x.to(device).requires_grad_() for x in (torch.randn(1, 3, 2, 4), *weights(device, norm, 2, 4))]
    frequency = torch.tensor([1.0, 0.01], device=device)
    torch.library.opcheck(rope_forward, (x, positions(device, 1, 3), frequency, w[0] if w else None, EPS))
