"""The probability of images under a diffusion model, by its probability-flow ODE (Song et al., 2021, arXiv 2011.13456,
section 4.3 and appendix D.2).

``dx / d ln sigma = x - D(x; sigma)`` carries images to noise and back, one to one. So the density of an image is that
of its noise, times how much the way stretches space: the integral of the divergence, whose trace is estimated with one
random vector of signs per image (Hutchinson, 1989). It is solved in ``y = x / sqrt(1 + sigma^2)``, which neither grows
nor shrinks, by the classical Runge-Kutta method of fourth order at equal distances of ``ln sigma``.

Shape suffixes: B = batch, C = channels, H, W = height and width, X = all numbers of an image.
"""

from collections.abc import Generator
from math import exp, log, log2, pi, prod
from typing import Final

import torch
from torch import Tensor

from shared.specs.diffusion import DiffusionSpec
from worker.families.family import Batch
from worker.families.nets.denoiser import Denoiser, centred
from worker.kernels.noise import Noise

STEPS: Final = 32
"""Each is four evaluations of the network, with as many backward passes."""
WITHIN_LEVEL, SIGNS = range(2)
"""Streams of noise."""
LEVELS: Final = 127.5
"""Grey levels per unit of x."""


def bits_per_dim(_spec: DiffusionSpec, net: Denoiser, batch: Batch, noise: Noise) -> Generator[None, None, Tensor]:
    """``-log2 p(x) / X`` of bytes ``(B,)``, without their classes; yields after each step.

    Bytes are spread evenly over their grey level, which makes it a bound of what they cost. The density is that of the
    model's images with noise of its lowest level, ``sigma_min``.
    """
    x_BCHW = dequantised(batch["image"], noise)
    num_dims = prod(x_BCHW.shape[1:])
    nats_B = yield from log_density(net, x_BCHW, signs(noise, x_BCHW))
    return -nats_B / (num_dims * log(2)) + log2(LEVELS)


def dequantised(image_BCHW: Tensor, noise: Noise) -> Tensor:
    """Each byte somewhere within half a level of itself, uniformly (Theis et al., 2016): float64, about [-1, 1]."""
    within_BCHW = noise.uniform(*image_BCHW.shape[1:], stream=WITHIN_LEVEL).double() - 0.5
    return centred(image_BCHW) + within_BCHW / LEVELS


def signs(noise: Noise, x_BCHW: Tensor) -> Tensor:
    """One or minus one, at random, for each number of ``x``."""
    bits_BX = noise.bits(prod(x_BCHW.shape[1:]), stream=SIGNS)
    return (1.0 - 2.0 * (bits_BX & 1).double()).view_as(x_BCHW)


def log_density(net: Denoiser, x_BCHW: Tensor, signs_BCHW: Tensor) -> Generator[None, None, Tensor]:
    """``log p(x; sigma_min)`` in nats ``(B,)``; yields after each step."""
    low, high = log(net.objective.sigma_min), log(net.objective.sigma_max)
    y_BCHW, h = x_BCHW * _shrink(low), (high - low) / STEPS
    num_dims = prod(x_BCHW.shape[1:])
    stretch_B = x_BCHW.new_zeros(len(x_BCHW))
    for step in range(STEPS):
        at = low + step * h
        k1 = slope(net, y_BCHW, at, signs_BCHW)
        k2 = slope(net, y_BCHW + h / 2 * k1[0], at + h / 2, signs_BCHW)
        k3 = slope(net, y_BCHW + h / 2 * k2[0], at + h / 2, signs_BCHW)
        k4 = slope(net, y_BCHW + h * k3[0], at + h, signs_BCHW)
        y_BCHW = y_BCHW + h / 6 * (k1[0] + 2 * k2[0] + 2 * k3[0] + k4[0])
        stretch_B = stretch_B + h / 6 * (k1[1] + 2 * k2[1] + 2 * k3[1] + k4[1])
        yield
    variance = (exp(high) * _shrink(high)) ** 2
    prior_B = -0.5 * (y_BCHW.flatten(1).square().sum(1) / variance + num_dims * log(2 * pi * variance))
    return prior_B + stretch_B + num_dims * log(_shrink(low))


def slope(net: Denoiser, y_BCHW: Tensor, log_sigma: float, signs_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """``dy / d ln sigma = c^2 y - c D(y / c; sigma)`` with ``c = 1 / sqrt(1 + sigma^2)``, and its divergence
    ``c^2 X - tr dD/dx`` as the signs estimate it, ``(B,)``."""
    c = _shrink(log_sigma)
    sigma_B = y_BCHW.new_full((len(y_BCHW),), exp(log_sigma))
    label_B = torch.full_like(sigma_B, net.num_classes, dtype=torch.int64)
    with torch.enable_grad():
        x_BCHW = (y_BCHW / c).requires_grad_()
        estimate_BCHW = net(x_BCHW, sigma_B, label_B)
        (product_BCHW,) = torch.autograd.grad((estimate_BCHW * signs_BCHW).sum(), x_BCHW)
    trace_B = (product_BCHW * signs_BCHW).flatten(1).sum(1)
    return c**2 * y_BCHW - c * estimate_BCHW.detach(), c**2 * prod(y_BCHW.shape[1:]) - trace_B


def _shrink(log_sigma: float) -> float:
    return (1 + exp(2 * log_sigma)) ** -0.5
