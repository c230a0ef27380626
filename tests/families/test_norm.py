"""Group normalisation and softmax by kernels for the CPU, against torch's own in float64."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from worker.families.nets import norm as norms
from worker.families.nets.norm import normalised, softmax
from worker.families.nets.unet import UNet, UNetLayout
from worker.kernels import native
from worker.kernels.noise import Domain, Noise

CPU = torch.device("cpu")
CHANNELS, GROUPS = 48, 8
THREADS = Path("/proc/self/task")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""Of the greatest number; for bfloat16 two roundings."""

pytestmark = pytest.mark.skipif(not native.is_available(), reason="there is no C++ compiler")


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return Noise.of_step(Domain.TRAINING, seed, 0, range(shape[0]), CPU).normal(*shape[1:])


def images(num: int, dtype: torch.dtype, *, mean: float = 3.0) -> Tensor:
    """Of 9 x 15 pixels, which are no whole number of blocks."""
    return (2 * drawn(num, CHANNELS, 9, 15) + mean).to(dtype).contiguous(memory_format=torch.channels_last)


def layer() -> nn.GroupNorm:
    made = nn.GroupNorm(GROUPS, CHANNELS, eps=1e-6)
    with torch.no_grad():
        made.weight.copy_(drawn(1, CHANNELS, seed=1)[0])
        made.bias.copy_(drawn(1, CHANNELS, seed=2)[0])
    return made


def slopes(function: Any, inputs: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    """What ``function`` gives, and its slopes by all inputs."""
    leaves = [one.detach().clone(memory_format=torch.preserve_format).requires_grad_() for one in inputs]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))


def wrong_by(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("dtype", "silu", "shifts", "mean"), list(product(TOLERANCE, (True, False), (True, False), (3.0, 300.0)))
)
def test_group_norm_gives_what_torch_gives_in_float64(
    dtype: torch.dtype, silu: bool, shifts: bool, mean: float
) -> None:
    x, given = images(3, dtype, mean=mean), layer()
    inputs = [x, given.weight, given.bias] + [drawn(3, CHANNELS, seed=3)] * shifts
    upstream = drawn(*x.shape, seed=4).to(dtype).contiguous(memory_format=torch.channels_last)

    def ours(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Tensor:
        carrier: Any = SimpleNamespace(weight=weight, bias=bias, num_groups=GROUPS, eps=given.eps)
        return normalised(carrier, x, shift, silu=silu)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Tensor:
        y = nn.functional.group_norm(
            x if shift is None else x + shift[:, :, None, None], GROUPS, weight, bias, given.eps
        )
        return nn.functional.silu(y) if silu else y

    found = slopes(ours, inputs, upstream)
    expected = slopes(plain, [one.double() for one in inputs], upstream)

    # Beside a distant mean float32 has fewer digits left for what differs from it.
    tolerance = TOLERANCE[dtype] if mean < 10 else 50 * 2e-6 + TOLERANCE[dtype]
    assert max(map(wrong_by, found, expected)) < tolerance


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_sample_is_the_same_alone_and_among_others_and_with_any_number_of_threads(dtype: torch.dtype) -> None:
    x, shift, upstream = images(5, dtype), drawn(5, CHANNELS, seed=3), images(5, dtype, mean=0.0)

    def one(rows: slice, threads: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(threads)
        y, dx, dshift = slopes(
            lambda x, shift: normalised(layer(), x, shift, silu=True), [x[rows], shift[rows]], upstream[rows]
        )
        return y[-1], dx[-1], dshift[-1]

    alone = one(slice(3, 4), 1)
    for rows, threads in product((slice(3, 4), slice(0, 4), slice(2, 4)), (1, 2, 3)):
        assert all(torch.equal(a, b) for a, b in zip(alone, one(rows, threads), strict=True))


@pytest.mark.usefixtures("_threads")
def test_a_lone_image_is_shared_out_among_threads_that_are_there() -> None:
    torch.set_num_threads(2)
    x = images(1, torch.float32)
    with torch.no_grad():
        normalised(layer(), x, None, silu=True)
        done, threads = Event(), set[Path]()

        def watch() -> None:
            while not done.is_set():
                threads.update(THREADS.iterdir())

        with ThreadPoolExecutor(1) as watching:
            watching.submit(watch)
            for _ in range(300):
                normalised(layer(), x, None, silu=True)
            done.set()
        remaining = {*THREADS.iterdir()}

    assert len(threads - remaining) <= 1  # the watcher


def test_a_sample_that_is_no_number_stays_alone() -> None:
    x = images(3, torch.bfloat16)
    spoilt = x.clone(memory_format=torch.preserve_format)
    spoilt[1, 0, 0, 0] = torch.nan

    whole, broken = (normalised(layer(), one, silu=True) for one in (x, spoilt))

    assert broken[1].isnan().any()
    assert torch.equal(broken[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize(("dtype", "num"), list(product(TOLERANCE, (1, 15, 49, 256))))
def test_softmax_gives_what_torch_gives_in_float64(dtype: torch.dtype, num: int) -> None:
    scores, upstream = (10 * drawn(4, num, num)).to(dtype), drawn(4, num, num, seed=1).to(dtype)

    found = slopes(lambda x: softmax(x, 0.3), [scores], upstream)
    expected = slopes(lambda x: (0.3 * x).softmax(-1), [scores.double()], upstream.double())

    assert (found[0].double() - expected[0]).abs().max() < TOLERANCE[dtype]
    assert (found[1].double() - expected[1]).abs().max() < TOLERANCE[dtype]


def test_a_network_gives_the_same_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = UNetLayout(block_out_channels=(16, 32), layers_per_block=1, attention_level=1, norm_num_groups=8)
    net = UNet(layout, 3).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for number, weight in enumerate(net.parameters()):
        weight.data.add_(0.1 * drawn(1, *weight.shape, seed=number)[0])
    x = drawn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    inputs = (x, torch.tensor([3.0, 900.0]), torch.zeros(2, dtype=torch.int64))

    with_kernels = net(*inputs)
    monkeypatch.setattr(norms.native, "is_available", lambda: False)

    without = net(*inputs)
    assert not torch.equal(with_kernels, without)
    assert torch.allclose(with_kernels, without, atol=1e-5)


def test_without_a_working_compiler_there_are_no_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(1, "c++", stderr=b"no such instruction")

    monkeypatch.setattr(native, "SOURCE", native.SOURCE.with_name("native.py"))  # not compiled before
    monkeypatch.setattr(subprocess, "run", refuse)

    assert native._library.__wrapped__() is None
    assert "no such instruction" in caplog.text
