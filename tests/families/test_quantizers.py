"""The quantisers against references written another way, in float64."""

import itertools
from math import prod

import pytest
import torch
from torch import Tensor

from worker.families.nets.quantizers import EmaCodebook, Fsq, nearest, usage
from worker.kernels.noise import Domain, Noise

CPU = torch.device("cpu")
NOISE = Noise.of_step(Domain.TRAINING, 3, 0, range(4), CPU)
LEVELS = [(8, 5, 5, 5), (7, 5, 5, 5), (2, 3, 4), (16,)]


def latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codebook(num_codes: int = 4, dim: int = 2, *, dead_below: float = 0.0, decay: float = 0.9) -> EmaCodebook:
    return EmaCodebook(num_codes, dim, decay=decay, commitment=0.25, dead_below=dead_below)


def levels_by_hand(value: float, num_levels: int) -> tuple[int, list[int]]:
    """The integer that the paper's ``round(f(z))`` gives, and all those that it can give."""
    half_range = (num_levels - 1) * 1.001 / 2
    shift = 0.5 if num_levels % 2 == 0 else 0.0
    start = torch.atanh(torch.tensor(shift / half_range, dtype=torch.float64)).item()
    bounded = torch.tanh(torch.tensor(value + start, dtype=torch.float64)).item() * half_range - shift
    lowest = -(num_levels // 2)
    return round(bounded), list(range(lowest, lowest + num_levels))


@pytest.mark.parametrize("levels", LEVELS)
def test_fsq_rounds_each_dimension_to_its_levels(levels: tuple[int, ...]) -> None:
    z = 2 * latents(50, len(levels))

    quantized = Fsq(levels)(z)

    for row, vector, code in zip(z.double(), quantized.vector, quantized.code, strict=True):
        by_hand = [levels_by_hand(value.item(), number) for value, number in zip(row, levels, strict=True)]
        digits = [possible.index(level) for level, possible in by_hand]
        expected = [level / (number // 2) for (level, _), number in zip(by_hand, levels, strict=True)]
        assert vector.tolist() == pytest.approx(expected, abs=1e-6)
        assert code == sum(digit * prod(levels[:place]) for place, digit in enumerate(digits))


@pytest.mark.parametrize("levels", LEVELS)
def test_every_code_of_fsq_is_reached_and_is_its_own(levels: tuple[int, ...]) -> None:
    fsq = Fsq(levels)
    codes = torch.arange(fsq.num_codes)
    vectors = fsq.vectors(codes)

    # A grid finer than the levels, from one end of the tanh to the other.
    found = [
        fsq(torch.linspace(-6, 6, 601)[:, None].expand(-1, len(levels))).vector[:, place]
        for place in range(len(levels))
    ]
    possible = itertools.product(*(column.unique().tolist() for column in found))

    assert len(vectors.unique(dim=0)) == prod(levels)
    assert set(map(tuple, vectors.tolist())) == set(possible)


def test_a_code_of_fsq_stays_what_it_is_when_it_is_quantised_again() -> None:
    """What rounds to a level, put into ``f`` as its inverse has it, is that level."""
    fsq = Fsq((8, 5, 5, 5))
    codes = torch.arange(fsq.num_codes)
    half_width = torch.tensor([4, 2, 2, 2])
    levels = torch.tensor([8, 5, 5, 5], dtype=torch.float64)
    half_range, shift = (levels - 1) * 1.001 / 2, torch.tensor([0.5, 0, 0, 0], dtype=torch.float64)
    level = fsq.vectors(codes).double() * half_width

    z = ((level + shift) / half_range).atanh() - (shift / half_range).atanh()

    assert torch.equal(fsq(z.float()).code, codes)


def test_the_gradient_passes_fsq_as_if_it_did_not_round() -> None:
    fsq = Fsq((8, 5, 5))
    z = latents(6, 3).requires_grad_()
    weight = latents(6, 3, seed=1)

    (through,) = torch.autograd.grad((fsq(z).vector * weight).sum(), z)

    (smooth,) = torch.autograd.grad((fsq.bounded(z) / torch.tensor([4, 2, 2]) * weight).sum(), z)
    assert torch.allclose(through, smooth, atol=1e-6)
    assert through.abs().min() > 0


def test_a_vector_is_quantised_to_the_nearest_code() -> None:
    z, codes = latents(200, 3), latents(7, 3, seed=1)

    assert torch.equal(nearest(z, codes), torch.cdist(z.double(), codes.double()).argmin(1))


def test_the_gradient_of_a_codebook_is_that_of_its_output_and_of_the_commitment() -> None:
    quantizer = codebook()
    z, weight = latents(5, 2).requires_grad_(), latents(5, 2, seed=1)
    quantized = quantizer(z)

    (gradient,) = torch.autograd.grad((quantized.vector * weight).sum() + quantized.commitment, z)

    pull = 2 * 0.25 * (z - quantizer.codebook_KD[quantized.code]) / z.numel()
    assert torch.equal(quantized.vector, quantizer.codebook_KD[quantized.code])
    assert torch.allclose(gradient, weight + pull, atol=1e-6)


def test_a_codebook_is_the_ratio_of_two_moving_averages() -> None:
    quantizer = codebook(decay=0.9)
    z = latents(40, 2)
    quantizer.learn(z, NOISE)
    count, total = quantizer.count_K.double(), quantizer.sum_KD.double()

    for seed in (1, 2, 3):
        z, old = latents(40, 2, seed=seed), quantizer.codebook_KD.double()
        code = torch.cdist(z.double(), old).argmin(1)
        count = 0.9 * count + 0.1 * torch.stack([(code == k).sum() for k in range(4)])
        total = 0.9 * total + 0.1 * torch.stack([z.double()[code == k].sum(0) for k in range(4)])
        quantizer.learn(z, NOISE)

        assert torch.allclose(quantizer.codebook_KD.double(), total / count[:, None], atol=1e-5)


def test_a_codebook_begins_at_the_clusters_of_its_first_batch() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    z = centres.repeat(50, 1) + 0.01 * latents(150, 2)
    quantizer = codebook(8, dead_below=0.01)

    quantizer.learn(z, NOISE)

    distances = torch.cdist(quantizer.codebook_KD, centres)
    assert distances.min(1).values.max() < 0.1
    assert distances.min(0).values.max() < 0.1


def test_a_dead_code_begins_again_at_a_vector_of_the_batch() -> None:
    quantizer = codebook(dead_below=0.1)
    z = latents(40, 2)
    quantizer.learn(z, NOISE)
    with torch.no_grad():
        quantizer.codebook_KD[2] = 1000.0
        quantizer.count_K[2] = 0.5
        quantizer.sum_KD[2] = 500.0
    before = quantizer.codebook_KD.clone()

    quantizer.learn(z, NOISE)

    assert (quantizer.codebook_KD[2] == z).all(1).any()
    assert quantizer.count_K[2] == 10
    assert (quantizer.codebook_KD[[0, 1, 3]] - before[[0, 1, 3]]).abs().max() < 0.5


def test_where_codes_begin_is_keyed() -> None:
    books = [codebook(dead_below=0.5) for _ in range(3)]

    for book, noise in zip(books, (NOISE, NOISE, Noise.of_step(Domain.TRAINING, 4, 0, range(4), CPU)), strict=True):
        book.learn(latents(40, 2), noise)

    assert torch.equal(books[0].codebook_KD, books[1].codebook_KD)
    assert not torch.equal(books[0].codebook_KD, books[2].codebook_KD)


def test_usage_counts_codes_and_perplexity_weighs_them() -> None:
    perplexity, used = usage(torch.tensor([[0, 1], [2, 2]]), 8)

    frequencies = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    assert perplexity.item() == pytest.approx((-(frequencies * frequencies.log()).sum()).exp().item(), rel=1e-5)
    assert used.item() == 3 / 8
