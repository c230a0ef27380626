"""Keyed noise is the published generator, bit for bit, and a number depends on its key alone."""

import numpy as np
import pytest
import torch

from worker.kernels.noise import Domain, Noise, permutation, philox

CPU = torch.device("cpu")

# Random123's kat_vectors, philox 4x32 10: counter, key, output.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def reference_philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox-4x32-10 in numpy's unsigned integers, written from the paper; ``(..., 4)`` and ``(..., 2)``."""
    x0, x1, x2, x3 = (counter[..., word].astype(np.uint64) for word in range(4))
    k0, k1 = (key[..., word].astype(np.uint64) for word in range(2))
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * x0, np.uint64(0xCD9E8D57) * x2
        x0, x1, x2, x3 = (p1 >> half) ^ x1 ^ k0, p1 & low, (p0 >> half) ^ x3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack((x0, x1, x2, x3), axis=-1)


def noise_of(seed: int = 7, step: int = 3, rows: range = range(5), domain: Domain = Domain.SAMPLING) -> Noise:
    return Noise.of_step(domain, seed, step, rows, CPU)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = philox([torch.tensor(word) for word in counter], [torch.tensor(word) for word in key])

    assert tuple(word.item() for word in words) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_the_reference_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert tuple(reference_philox(np.array(counter), np.array(key)).tolist()) == expected


def test_the_bits_are_those_of_the_numpy_reference() -> None:
    """Counter words: element block, index, step, domain and stream; key: the seed's two halves."""
    seed = 0x0123_4567_89AB_CDEF
    noise = Noise.of_step(Domain.SAMPLING, seed, 9, range(3), CPU)

    counters = np.array([[(block, index, 9, 2 << 16 | 5) for block in range(4)] for index in range(3)])
    keys = np.broadcast_to(np.array([seed & 0xFFFFFFFF, seed >> 32]), (3, 4, 2))
    expected = reference_philox(counters, keys).reshape(3, 16)[:, :14]
    assert np.array_equal(noise.bits(14, stream=5).numpy(), expected.astype(np.int64))


@pytest.mark.parametrize(
    "other",
    [
        noise_of(seed=8),
        noise_of(seed=7 + 2**32),
        noise_of(step=4),
        noise_of(domain=Domain.TRAINING),
        noise_of(rows=range(5, 10)),
    ],
    ids=["seed", "high half of the seed", "step", "domain", "index"],
)
def test_every_part_of_the_key_matters(other: Noise) -> None:
    matching = (noise_of().bits(1000) == other.bits(1000)).sum()

    assert matching == 0


def test_streams_are_unrelated() -> None:
    assert (noise_of().bits(1000, stream=0) == noise_of().bits(1000, stream=1)).sum() == 0


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    alone = noise_of(rows=range(3, 4)).normal(2, 5)

    assert torch.equal(noise_of(rows=range(64)).normal(2, 5)[3:4], alone)


def test_rows_may_have_seeds_of_their_own() -> None:
    keys = {"step_B": torch.tensor([3, 3]), "index_B": torch.tensor([0, 0])}
    both = Noise(domain=Domain.SAMPLING, seed_B=torch.tensor([1, 2]), **keys)

    expected = torch.cat([noise_of(seed=seed, rows=range(1)).normal(7) for seed in (1, 2)])
    assert torch.equal(both.normal(7), expected)


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    assert torch.equal(noise_of().normal(10)[:, :7], noise_of().normal(7))


def test_normals_are_box_and_mullers() -> None:
    words = noise_of().bits(6).numpy().astype(np.float64)

    u, v = (words[:, 0::2] + 0.5) / 2**32, (words[:, 1::2] + 0.5) / 2**32
    radius, angle = np.sqrt(-2 * np.log(u)), 2 * np.pi * v
    expected = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1).reshape(-1, 6)
    assert np.allclose(noise_of().normal(6).numpy(), expected, rtol=1e-6, atol=1e-7)


def test_normals_have_the_moments_of_the_normal_distribution() -> None:
    x = noise_of(rows=range(64)).normal(4096).double()

    moments = [x.pow(power).mean().item() for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.05)
    assert torch.corrcoef(x.view(2, -1))[0, 1].abs() < 0.01


def test_uniforms_stay_inside_the_open_interval() -> None:
    x = noise_of(rows=range(100_000)).uniform(4)

    assert 0 < x.min() < 1e-4
    assert 1 - 1e-4 < x.max() < 1
    assert x.mean().item() == pytest.approx(0.5, abs=0.002)


def test_an_epoch_is_a_permutation() -> None:
    assert permutation(1000, seed=1, epoch=0).sort().values.tolist() == list(range(1000))


def test_every_epoch_has_an_order_of_its_own() -> None:
    same_place = permutation(1000, seed=1, epoch=0) == permutation(1000, seed=1, epoch=1)

    assert same_place.sum() < 10


def test_the_step_is_known_without_asking_the_numbers() -> None:
    noise = Noise.of_step(Domain.TRAINING, 3, 41, range(2), torch.device("meta"))

    assert noise.step == 41


def test_the_step_of_keys_alone_is_theirs() -> None:
    keys = torch.tensor([5, 5])

    assert Noise(domain=Domain.TRAINING, seed_B=keys, step_B=keys, index_B=keys).step == 5
