"""How near an image is to the one it should be. Shape suffixes: B = batch, C = channels, H, W = height and width."""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

PEAK: Final = 255.0
WINDOW: Final = 11
"""Pixels of SSIM's Gaussian window along each axis; the largest odd number that fits in smaller images."""
WINDOW_SIGMA: Final = 1.5
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def mean_squared_error(image_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Of bytes, float64 ``(B,)``."""
    return (image_BCHW.double() - target_BCHW.double()).square().flatten(1).mean(1)


def psnr(image_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of bytes in decibels, float64 ``(B,)``; at most 88."""
    error_B = mean_squared_error(image_BCHW, target_BCHW).clamp(min=1e-4)
    return 10 * (PEAK**2 / error_B).log10()


def ssim(image_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Structural similarity of bytes (Wang et al., 2004), mean over colours and places, float64 ``(B,)``."""
    x_BCHW, y_BCHW = image_BCHW.double(), target_BCHW.double()
    mean_x, mean_y = _windowed(x_BCHW), _windowed(y_BCHW)
    var_x = _windowed(x_BCHW**2) - mean_x**2
    var_y = _windowed(y_BCHW**2) - mean_y**2
    cov = _windowed(x_BCHW * y_BCHW) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    contrast = (2 * cov + C2) / (var_x + var_y + C2)
    return (luminance * contrast).flatten(1).mean(1)


def _windowed(x_BCHW: Tensor) -> Tensor:
    """Means under the Gaussian window, where it fits wholly."""
    size = min(WINDOW, *((side - 1) // 2 * 2 + 1 for side in x_BCHW.shape[2:]))
    place = torch.arange(size, dtype=x_BCHW.dtype, device=x_BCHW.device) - size // 2
    window = (-(place**2) / (2 * WINDOW_SIGMA**2)).exp()
    window = window / window.sum()
    channels = x_BCHW.shape[1]
    across = F.conv2d(x_BCHW, window.expand(channels, 1, 1, size), groups=channels)
    return F.conv2d(across, window[:, None].expand(channels, 1, size, 1), groups=channels)
