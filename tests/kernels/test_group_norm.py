"""Group normalisation with SiLU: Triton's kernels compute what torch's own operations do, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from worker.kernels.dispatch import group_norm_silu
from worker.kernels.group_norm import Modulation, Norm, plain
from worker.kernels.noise import Domain, Noise

EPS = 1e-6
SHAPES = [
    pytest.param((2, 8, 4, 4), 2, id="powers of two"),
    pytest.param((2, 15, 5, 7), 3, id="odd everything"),
    pytest.param((1, 96, 9, 11), 2, id="several pieces, channels in two tiles, 48 channels a group"),
    pytest.param((3, 6, 1, 1), 3, id="one pixel"),
    pytest.param((2, 5, 3, 2), 5, id="a channel a group"),
    pytest.param((1, 7, 2, 3), 1, id="one group"),
    pytest.param((1, 2, 33, 65), 1, id="more pixels than a tile holds"),
    pytest.param((1, 64, 47, 48), 1, id="more pieces than are put together at once"),
]


def drawn(*shape: int, stream: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals, the same in each run."""
    noise = Noise.of_step(Domain.TRAINING, 3, 0, range(shape[0]), torch.device("cpu"))
    return noise.normal(*shape[1:], stream=stream).to(device, dtype)


class Case:
    """An image batch, a norm's parameters and a gradient from above, all wanting gradients."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, *, modulated: bool, dtype: torch.dtype) -> None:
        batch, channels = shape[:2]
        wide = torch.promote_types(dtype, torch.float32)
        x = (2 * drawn(*shape, stream=0, device=device) + 1).to(dtype)
        self.inputs = [
            x.contiguous(memory_format=torch.channels_last),
            *(drawn(channels, stream=stream, device=device, dtype=wide) for stream in (1, 2)),
            *(drawn(batch, channels, stream=stream, device=device, dtype=wide) for stream in (3, 4) if modulated),
        ]
        self.dy = drawn(*shape, stream=5, device=device, dtype=dtype)

    def run(self, function: Callable[..., Tensor], num_groups: int, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The result and all gradients, computed in ``dtype``."""
        inputs = [each.to(dtype or each.dtype).detach().requires_grad_() for each in self.inputs]
        x, weight, bias, *modulation = inputs
        y = function(x, Norm(weight, bias, num_groups, EPS), Modulation(*modulation) if modulation else None)
        return [y.detach(), *torch.autograd.grad(y, inputs, self.dy.to(y.dtype))]


def fused(x: Tensor, norm: Norm, modulation: Modulation | None = None) -> Tensor:
    from worker.kernels.group_norm_launch import fused as launched

    return launched(x, norm, modulation)


def distance(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("modulated", [False, True], ids=["plain", "modulated"])
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES)
def test_the_kernels_agree_with_torch_in_double_precision(
    device: torch.device, shape: tuple[int, ...], num_groups: int, modulated: bool
):
    case = Case(shape, device, modulated=modulated, dtype=torch.float32)

    exact = case.run(plain, num_groups, torch.float64)
    # Where a group is two numbers, little is left of the gradient but rounding errors: torch's are the measure.
    for got, usual, expected in zip(case.run(fused, num_groups), case.run(plain, num_groups), exact, strict=True):
        assert distance(got, expected) <= 4 * distance(usual, expected) + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_cost_no_more_than_one_rounding(device: torch.device, dtype: torch.dtype):
    case = Case((2, 12, 5, 3), device, modulated=True, dtype=dtype)

    y, dx, *_ = case.run(fused, 3)
    expected_y, expected_dx, *_ = case.run(plain, 3, torch.float64)
    # The interpreter cuts bfloat16 off where a GPU rounds it.
    ulp = torch.finfo(dtype).eps
    assert y.dtype == dx.dtype == dtype
    assert ((y - expected_y).abs() <= ulp * expected_y.abs() + 1e-6).all()
    assert ((dx - expected_dx).abs() <= ulp * expected_dx.abs() + 1e-6).all()


def test_the_derivative_is_that_of_the_function(device: torch.device):
    """Against differences of the kernels' own results, in float64."""
    case = Case((2, 6, 2, 3), device, modulated=True, dtype=torch.float64)
    inputs = [each.requires_grad_() for each in case.inputs]

    assert torch.autograd.gradcheck(
        lambda x, weight, bias, *modulation: fused(x, Norm(weight, bias, 2, EPS), Modulation(*modulation)),
        inputs,
        fast_mode=True,
    )


def test_torch_s_own_operations_have_the_right_derivative(device: torch.device):
    case = Case((2, 6, 2, 3), device, modulated=True, dtype=torch.float64)
    inputs = [each.requires_grad_() for each in case.inputs]

    assert torch.autograd.gradcheck(
        lambda x, weight, bias, *modulation: plain(x, Norm(weight, bias, 2, EPS), Modulation(*modulation)), inputs
    )


def test_large_values_that_differ_little_keep_their_difference(device: torch.device):
    """A variance from the mean of squares would be noise here."""
    case = Case((1, 6, 9, 40), device, modulated=False, dtype=torch.float32)
    case.inputs[0] += 1000

    assert distance(case.run(fused, 2)[0], case.run(plain, 2, torch.float64)[0]) < 1e-4


def test_an_image_does_not_depend_on_its_neighbours(device: torch.device):
    case = Case((3, 10, 5, 9), device, modulated=True, dtype=torch.float32)
    together = case.run(fused, 2)

    case.inputs[0], case.dy = case.inputs[0][1:2], case.dy[1:2]
    case.inputs[3:] = [each[1:2] for each in case.inputs[3:]]
    alone = case.run(fused, 2)
    assert all(torch.equal(alone[of], together[of][1:2]) for of in (0, 1, 4, 5))


def test_the_same_bits_come_out_each_time(device: torch.device):
    case = Case((2, 10, 9, 9), device, modulated=True, dtype=torch.float32)

    assert all(map(torch.equal, case.run(fused, 2), case.run(fused, 2)))


@pytest.mark.parametrize(
    "view",
    [
        lambda wide: wide[:, 1:7],
        lambda wide: wide[:, :6].contiguous(),
        lambda wide: wide[:, :6].transpose(2, 3),
        lambda wide: wide[:, :6, ::2, 1:],
        lambda wide: wide[:1, :6].expand(2, -1, -1, -1),
    ],
    ids=["some channels", "NCHW", "transposed", "every other row", "one image twice"],
)
def test_any_strides_will_do(device: torch.device, view: Callable[[Tensor], Tensor]):
    wide = drawn(2, 8, 4, 3, stream=0, device=device).contiguous(memory_format=torch.channels_last)
    weight, bias = (drawn(12, stream=stream, device=device)[::2] for stream in (1, 2))
    norm = Norm(weight, bias, 3, EPS)
    x = view(wide).requires_grad_()
    y = fused(x, norm)
    dy = drawn(*reversed(y.shape), stream=5, device=device).permute(3, 2, 1, 0)

    expected = plain(x, norm)
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(expected, x, dy)[0], atol=1e-5)


def test_a_second_derivative_is_refused(device: torch.device):
    """It would silently be wrong: what is differentiated twice must not go through these kernels."""
    x = drawn(1, 4, 2, 2, stream=0, device=device).requires_grad_()
    weight, bias = (drawn(4, stream=stream, device=device) for stream in (1, 2))
    norm = Norm(weight, bias, 2, EPS)
    (slope,) = torch.autograd.grad(fused(x, norm).square().sum(), x, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_groups_must_be_even(device: torch.device):
    x = drawn(1, 6, 2, 2, stream=0, device=device)

    with pytest.raises(ValueError, match="6 channels do not make 4 groups"):
        fused(x, Norm(x[0, :, 0, 0], x[0, :, 0, 0], 4, EPS))


def test_what_is_asked_for_comes_in_the_layout_of_the_input():
    x = drawn(2, 8, 4, 3, stream=0, device=torch.device("cpu")).contiguous(memory_format=torch.channels_last)
    norm = Norm(torch.ones(8), torch.zeros(8), 2, EPS)

    y = group_norm_silu(x, norm)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, plain(x, norm))


@pytest.mark.parametrize(("size", "is_small"), [(2047, True), (2048, False)])
def test_an_image_of_more_pieces_than_a_grid_has_room_for_is_left_to_torch(size: int, is_small: bool) -> None:
    launching = pytest.importorskip("worker.kernels.group_norm_launch", exc_type=ImportError)
    assert launching.fits(torch.empty(1, 64, size, size, device="meta")) is is_small
