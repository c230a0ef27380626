"""The optimizer step over flat buffers: what torch's AdamW, clipping, averaging and rounding do one after the other."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from worker.kernels.adamw import RATES, Flat, plain, rates
from worker.kernels.dispatch import descend
from worker.kernels.noise import Domain, Noise

STEP: dict[str, Any] = {"learning_rate": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "ema_decay": 0.9}


def fused(flat: Flat, rates: Tensor) -> Tensor:
    from worker.kernels.adamw_triton import fused as launched

    return launched(flat, rates)


def drawn(num: int, stream: int, device: torch.device) -> Tensor:
    noise = Noise.of_step(Domain.TRAINING, 3, 0, range(1), torch.device("cpu"))
    return noise.normal(num, stream=stream)[0].to(device)


def flat_of(num: int, device: torch.device, *, grad: torch.dtype = torch.float32, num_decayed: int = 0) -> Flat:
    weights = drawn(num, 0, device)
    return Flat(
        weight_P=weights,
        grad_P=drawn(num, 1, device).to(grad),
        mean_P=torch.zeros_like(weights),
        square_P=torch.zeros_like(weights),
        average_P=weights.clone(),
        rounded_P=torch.empty_like(weights, dtype=torch.bfloat16),
        num_decayed=num_decayed,
    )


def tensors(flat: Flat) -> dict[str, Tensor]:
    return {field.name: getattr(flat, field.name) for field in fields(flat) if field.name.endswith("_P")}


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("step", [plain, fused], ids=["plain", "fused"])
@pytest.mark.parametrize("clip", [0.5, 1e3], ids=["clipped", "not clipped"])
def test_it_does_what_torch_s_parts_do(device: torch.device, step: Callable[[Flat, Tensor], Tensor], clip: float):
    """Three steps, two kinds of weights, of which the second does not decay."""
    flat = flat_of(1500, device, num_decayed=1025)
    decayed, kept = (nn.Parameter(part.clone()) for part in flat.weight_P.split([1025, 475]))
    weights = average = flat.weight_P.clone()
    optimizer = torch.optim.AdamW(
        [{"params": [decayed], "weight_decay": 0.1}, {"params": [kept], "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.99),
    )
    for number in range(3):
        grad = drawn(1500, 10 + number, device)
        flat.grad_P.copy_(grad)
        norm = step(flat, rates(number, clip=clip, **STEP))

        decayed.grad, kept.grad = (part.clone() for part in grad.split([1025, 475]))
        expected_norm = nn.utils.clip_grad_norm_([decayed, kept], clip)
        optimizer.step()
        weights = torch.cat([decayed, kept]).detach()
        average.lerp_(weights, 0.1)
        assert close(norm, expected_norm)

    assert close(flat.weight_P, weights)
    assert close(flat.average_P, average)
    assert close(flat.mean_P, torch.cat([optimizer.state[each]["exp_avg"] for each in (decayed, kept)]))
    assert close(flat.square_P, torch.cat([optimizer.state[each]["exp_avg_sq"] for each in (decayed, kept)]))


@pytest.mark.parametrize("num", [1, 3, 1023, 1025, 8193, 20_000])
def test_any_length_will_do(device: torch.device, num: int):
    one, other = (flat_of(num, device, num_decayed=num // 2) for _ in range(2))
    told = rates(4, clip=1.0, **STEP)

    assert close(fused(one, told), plain(other, told))
    for name in ("weight_P", "mean_P", "square_P", "average_P"):
        assert close(tensors(one)[name], tensors(other)[name]), name


def test_the_norm_is_of_all_sums_however_many(device: torch.device):
    """More of them than are added at once, which takes more weights than the interpreter goes through in a test."""
    from worker.kernels import adamw_triton
    from worker.kernels.choice import launch

    sums, norm = drawn(2500, 0, device).square(), torch.empty((), device=device)
    launch(adamw_triton._root, (1,), sums, norm, len(sums), BLOCK=adamw_triton.BLOCK)
    assert close(norm, sums.sum().sqrt())


def test_nothing_is_written_beyond_the_end(device: torch.device):
    flat = flat_of(1100, device)
    rooms = {name: torch.full((1200,), 7, dtype=tensor.dtype, device=device) for name, tensor in tensors(flat).items()}
    for name, tensor in tensors(flat).items():
        rooms[name][:1100] = tensor

    fused(replace(flat, **{name: room[:1100] for name, room in rooms.items()}), rates(0, clip=1.0, **STEP))
    assert all((room[1100:] == 7).all() for room in rooms.values())


@pytest.mark.parametrize("rounded", [torch.bfloat16, torch.float16])
def test_the_copy_is_the_weights_rounded(device: torch.device, rounded: torch.dtype):
    flat = flat_of(1100, device)
    copy = torch.empty_like(flat.weight_P, dtype=rounded)
    fused(replace(flat, rounded_P=copy), rates(0, clip=1.0, **STEP))

    # The interpreter cuts bfloat16 off where a GPU rounds it.
    assert ((copy - flat.weight_P).abs() <= torch.finfo(rounded).eps * flat.weight_P.abs()).all()


def test_there_need_be_no_copy(device: torch.device):
    flat = replace(flat_of(1100, device), rounded_P=None)
    expected = flat_of(1100, device)
    for each in (flat, expected):
        fused(each, rates(0, clip=1.0, **STEP))

    assert torch.equal(flat.weight_P, expected.weight_P)


def test_gradients_may_have_sixteen_bits(device: torch.device):
    one, other = (flat_of(1100, device, grad=torch.bfloat16) for _ in range(2))
    told = rates(0, clip=0.1, **STEP)

    assert close(fused(one, told), plain(other, told))
    assert close(one.weight_P, other.weight_P)


def test_the_same_bits_come_out_each_time(device: torch.device):
    one, other = (flat_of(20_000, device) for _ in range(2))
    told = rates(2, clip=0.1, **STEP)

    assert torch.equal(fused(one, told), fused(other, told))
    assert all(torch.equal(tensor, tensors(other)[name]) for name, tensor in tensors(one).items())


@pytest.mark.parametrize("step", [plain, fused], ids=["plain", "fused"])
def test_a_gradient_that_is_no_number_shows_in_the_norm(device: torch.device, step: Callable[[Flat, Tensor], Tensor]):
    flat = flat_of(1100, device)
    flat.grad_P[1050] = float("nan")

    assert step(flat, rates(0, clip=1.0, **STEP)).isnan()
    assert flat.weight_P.isnan().all()


def test_buffers_of_unequal_length_are_refused(device: torch.device):
    flat = flat_of(10, device)

    with pytest.raises(ValueError, match="of one length"):
        fused(replace(flat, mean_P=flat.mean_P[:9]), rates(0, clip=1.0, **STEP))


def test_the_rates_of_a_step_are_those_of_the_paper():
    told = dict(zip(RATES, rates(1, clip=2.0, **STEP).tolist(), strict=True))

    assert told["mean_correction"] == pytest.approx(1 - 0.9**2)
    assert told["root_correction"] == pytest.approx((1 - 0.99**2) ** 0.5)
    assert told["average_weight"] == pytest.approx(0.1)


def test_where_there_is_no_gpu_torch_s_own_operations_are_used():
    one, other = (flat_of(50, torch.device("cpu")) for _ in range(2))
    told = rates(0, clip=1.0, **STEP)

    assert torch.equal(descend(one, told), plain(other, told))
    assert torch.equal(one.weight_P, other.weight_P)
