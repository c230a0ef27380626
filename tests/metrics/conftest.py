"""Images with something in common and something of their own, from keyed noise."""

import torch
from torch import Tensor

from worker.kernels.noise import Domain, Noise


def noise(num: int, seed: int = 0) -> Noise:
    return Noise.of_step(Domain.EVALUATION, seed, 7, range(num), torch.device("cpu"))


def vectors(num: int, dim: int, *, seed: int = 0) -> Tensor:
    """Normal vectors, float64: correlated, with means and deviations of their own."""
    mixing = Noise.of_step(Domain.EVALUATION, 99, 0, range(dim), torch.device("cpu")).normal(dim).double()
    return noise(num, seed).normal(dim).double() @ mixing / dim**0.5 + torch.linspace(-1, 1, dim).double()


def strokes(num: int, *, seed: int = 0, size: int = 28) -> Tensor:
    """Grey images of one blurred bar each, at a random place and angle: uint8 ``(num, 1, size, size)``."""
    angle, shift, bright = noise(num, seed).uniform(3).unbind(1)
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    theta = (angle * torch.pi)[:, None, None]
    across = x * theta.cos() + y * theta.sin() - (shift[:, None, None] - 0.5)
    image = (-((across / 0.15) ** 2)).exp() * (0.5 + bright[:, None, None] / 2)
    return (image * 255).round().to(torch.uint8)[:, None]
