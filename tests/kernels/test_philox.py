"""Keyed noise in one launch: the words are the published generator's, bit for bit, whoever shares the launch."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.kernels import philox
from worker.kernels.noise import Domain, Noise

SEEDS = [0, 1, 2**32, 0x0123_4567_89AB_CDEF, 2**63 - 1]


def draw(noise: Noise, num_elements: int, kind: str, stream: int = 0) -> Tensor:
    """By Triton's kernel, in main memory."""
    from worker.kernels import philox_triton

    return philox_triton.draw(noise, num_elements, stream=stream, kind=getattr(philox_triton, kind)).cpu()


def noise_of(device: torch.device, rows: slice = slice(None)) -> Noise:
    """Rows of all kinds of keys."""
    keys = {
        "seed_B": SEEDS,
        "step_B": [0, 999, 2**31, 7, 2**32 - 1],
        "index_B": [5, 2**32 - 1, 0, 4095, 1],
    }
    return Noise(
        domain=Domain.SAMPLING, **{name: torch.tensor(values, device=device)[rows] for name, values in keys.items()}
    )


def reference(noise: Noise, num_elements: int, stream: int) -> NDArray[np.uint64]:
    """Philox-4x32-10 in numpy's unsigned integers, written from the paper; ``(B, num_elements)``."""
    seed, step, index = (
        key.cpu().numpy().astype(np.uint64)[:, None] for key in (noise.seed_B, noise.step_B, noise.index_B)
    )
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    block = np.arange(-(-num_elements // 4), dtype=np.uint64)[None]
    purpose = np.uint64(int(noise.domain) * 2**16 + stream)
    x0, x1, x2, x3 = np.broadcast_arrays(block, index & low, step & low, purpose)
    k0, k1 = seed & low, seed >> half
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * x0, np.uint64(0xCD9E8D57) * x2
        x0, x1, x2, x3 = (p1 >> half) ^ x1 ^ k0, p1 & low, (p0 >> half) ^ x3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack((x0, x1, x2, x3), axis=-1).reshape(len(seed), -1)[:, :num_elements]


@pytest.mark.parametrize("num_elements", [1, 2, 3, 4, 1029, 2050])
def test_the_words_are_those_of_the_numpy_reference(device: torch.device, num_elements: int):
    noise = noise_of(device)

    words = draw(noise, num_elements, "BITS", stream=3)
    assert np.array_equal(words.numpy().astype(np.uint64), reference(noise, num_elements, stream=3))


@pytest.mark.parametrize("num_elements", [1, 6, 1029])
def test_the_words_are_those_of_keyed_noise(device: torch.device, num_elements: int):
    noise = noise_of(device)

    assert torch.equal(draw(noise, num_elements, "BITS", stream=1007), noise.bits(num_elements, stream=1007).cpu())


@pytest.mark.parametrize("num_elements", [1, 6, 1029])
def test_uniform_numbers_are_those_of_keyed_noise_to_the_bit(device: torch.device, num_elements: int):
    noise = noise_of(device)

    assert torch.equal(draw(noise, num_elements, "UNIFORM"), noise.uniform(num_elements).cpu())


def test_normals_are_those_of_keyed_noise_but_for_a_neighbouring_number(device: torch.device):
    """Of 10^8 numbers one may be rounded to the other side: of these twenty thousand, none should be."""
    noise = noise_of(device)

    got, expected = draw(noise, 4099, "NORMAL"), noise.normal(4099).cpu()
    neighbours = torch.nextafter(expected, got)
    assert torch.equal(torch.where(got == expected, expected, neighbours), got)
    assert (got != expected).sum() <= 1


@pytest.mark.parametrize("kind", ["BITS", "UNIFORM", "NORMAL"])
def test_a_row_does_not_depend_on_the_others(device: torch.device, kind: str):
    together = draw(noise_of(device), 1030, kind)

    alone = draw(noise_of(device, rows=slice(3, 4)), 1030, kind)
    assert torch.equal(alone, together[3:4])


def test_keys_may_be_a_view(device: torch.device):
    noise = noise_of(device, rows=slice(None, None, 2))

    assert torch.equal(draw(noise, 9, "BITS"), noise.bits(9).cpu())


def test_no_rows_and_no_numbers_are_no_error(device: torch.device):
    assert draw(noise_of(device, rows=slice(0)), 5, "NORMAL").shape == (0, 5)
    assert draw(noise_of(device), 0, "NORMAL").shape == (5, 0)


def test_where_there_is_no_gpu_keyed_noise_itself_is_drawn():
    noise = noise_of(torch.device("cpu"))

    assert torch.equal(philox.bits(noise, 6, stream=2), noise.bits(6, stream=2))
    assert torch.equal(philox.uniform(noise, 2, 3, stream=2), noise.uniform(2, 3, stream=2))
    assert torch.equal(philox.normal(noise, 2, 3, stream=2), noise.normal(2, 3, stream=2))
