"""A whole optimizer step over flat buffers: clipped AdamW, the moving average of the weights, and their rounded copy.

AdamW is Loshchilov and Hutter's (2019, arXiv 1711.05101), as in ``torch.optim.AdamW``. In one pass over memory each
weight costs 38 bytes: its value, gradient, two moments and average are read, and all but the gradient written, besides
the copy in 16 bits. Shape suffix: P = all weights, one after the other.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Final

import torch
from torch import Tensor

CLIP_EPS: Final = 1e-6
"""Added to the norm by which gradients are divided, as by ``torch.nn.utils.clip_grad_norm_``."""


@dataclass(frozen=True, kw_only=True)
class Flat:
    """The buffers of one optimizer, all ``(P,)`` and float32 but for gradients and copy."""

    weight_P: Tensor
    grad_P: Tensor
    mean_P: Tensor
    """Moving average of the gradient."""
    square_P: Tensor
    """Moving average of its square."""
    average_P: Tensor
    """Moving average of the weights."""
    rounded_P: Tensor | None = None
    """The weights in the precision that the network computes in."""
    num_decayed: int = 0
    """The first so many weights decay: matrices and kernels, which therefore come before gains and biases."""


RATES: Final = (
    "learning_rate",
    "weight_decay",
    "beta1",
    "beta2",
    "eps",
    "mean_correction",
    "root_correction",
    "average_weight",
    "clip",
)
"""What a step is told, in this order."""


def rates(
    step: int,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    ema_decay: float,
    clip: float,
    eps: float = 1e-8,
) -> Tensor:
    """Of the step with this number, counted from 0: float32 in main memory, ordered as ``RATES``.

    A tensor, so that a captured step can be replayed with other rates by copying them into the one it was given.
    """
    return torch.tensor(
        [
            learning_rate,
            weight_decay,
            *betas,
            eps,
            1 - betas[0] ** (step + 1),
            sqrt(1 - betas[1] ** (step + 1)),
            1 - ema_decay,
            clip,
        ]
    )


@torch.no_grad()
def plain(flat: Flat, rates: Tensor) -> Tensor:
    """One step in place, in torch's own operations; returns the gradient's norm before clipping, a float32 scalar."""
    rate = dict(zip(RATES, rates.to(flat.weight_P.device).unbind(), strict=True))
    grad_P = flat.grad_P.float()
    norm = grad_P.square().sum().sqrt()
    grad_P = grad_P * (rate["clip"] / (norm + CLIP_EPS)).clamp(max=1)
    flat.weight_P[: flat.num_decayed] *= 1 - rate["learning_rate"] * rate["weight_decay"]
    flat.mean_P.add_((1 - rate["beta1"]) * (grad_P - flat.mean_P))
    flat.square_P.mul_(rate["beta2"]).add_((1 - rate["beta2"]) * grad_P * grad_P)
    root_P = flat.square_P.sqrt() / rate["root_correction"] + rate["eps"]
    flat.weight_P.sub_(rate["learning_rate"] / rate["mean_correction"] * (flat.mean_P / root_P))
    flat.average_P.add_(rate["average_weight"] * (flat.weight_P - flat.average_P))
    if flat.rounded_P is not None:
        flat.rounded_P.copy_(flat.weight_P)
    return norm
