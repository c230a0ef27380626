"""PSNR and SSIM of image pairs against sums written out."""

from math import exp, log10

import numpy as np
import pytest
import torch

from tests.metrics.conftest import noise, strokes
from worker.metrics.images import psnr, ssim


def spoilt(seed: int = 5) -> torch.Tensor:
    """The strokes of seed 0, with noise."""
    return (strokes(4, size=16).float() + 20 * noise(4, seed).normal(1, 16, 16)).clamp(0, 255).to(torch.uint8)


def test_psnr_is_ten_times_the_logarithm_of_peak_over_error() -> None:
    x, y = strokes(4, size=16), spoilt()

    for found, a, b in zip(psnr(x, y).tolist(), x.numpy().astype(float), y.numpy().astype(float), strict=True):
        assert found == pytest.approx(10 * log10(255**2 / np.mean((a - b) ** 2)))


def test_equal_images_have_a_finite_psnr_and_a_similarity_of_one() -> None:
    x = strokes(4)

    assert psnr(x, x).isfinite().all()
    assert torch.allclose(ssim(x, x), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(("size", "window"), [(16, 11), (8, 7), (5, 5)])
def test_ssim_is_the_mean_over_windows_of_wang_s_formula(size: int, window: int) -> None:
    x, y = (images[:, :, :size, :size] for images in (strokes(4, size=16), spoilt()))
    weight = np.array([exp(-((i - window // 2) ** 2) / 4.5) for i in range(window)])
    weight = np.outer(weight, weight) / weight.sum() ** 2

    def similarity(a: np.ndarray, b: np.ndarray) -> float:
        mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
        var_a, var_b = (weight * (a - mean_a) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
        cov = (weight * (a - mean_a) * (b - mean_b)).sum()
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        return (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))

    for found, a, b in zip(ssim(x, y).tolist(), x[:, 0].numpy().astype(float), y[:, 0].numpy(), strict=True):
        places = [(i, j) for i in range(size - window + 1) for j in range(size - window + 1)]
        windows = [(a[i : i + window, j : j + window], b[i : i + window, j : j + window]) for i, j in places]
        assert found == pytest.approx(np.mean([similarity(one, other) for one, other in windows]), rel=1e-7)


def test_the_colours_of_an_image_are_compared_each_with_itself() -> None:
    x, y = strokes(4, size=16), spoilt()

    together = ssim(torch.cat([x, y], dim=1), torch.cat([x, x], dim=1))

    assert torch.allclose(together, (1 + ssim(y, x)) / 2)
