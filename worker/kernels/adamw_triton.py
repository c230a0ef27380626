"""Triton's kernels of ``worker.kernels.adamw``: the norm in two ordered sums, then everything in one pass."""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from worker.kernels.adamw import CLIP_EPS, Flat
from worker.kernels.choice import launch

BLOCK: Final = 1024
SUMMED: Final = 8192
"""Squares that one program adds."""


@triton.jit
def _square(grad, sums, num_weights, SUMMED: tl.constexpr):
    """The sum of a piece's squares."""
    place = tl.program_id(0).to(tl.int64) * SUMMED + tl.arange(0, SUMMED)
    values = tl.load(grad + place, mask=place < num_weights, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(values * values, axis=0))


@triton.jit
def _root(sums, norm, num_sums, BLOCK: tl.constexpr):
    """The root of all sums, added in their order."""
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for first in range(0, num_sums, BLOCK):
        place = first + tl.arange(0, BLOCK)
        total += tl.load(sums + place, mask=place < num_sums, other=0.0)
    tl.store(norm, tl.sqrt(tl.sum(total, axis=0)))


@triton.jit
def _descend(
    weight,
    grad,
    mean,
    square,
    average,
    rounded,
    norm,
    rates,
    num_decayed,
    num_weights,
    CLIP_EPS: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pass over some of the weights; ``rates`` are ordered as ``worker.kernels.adamw.RATES``."""
    learning_rate, weight_decay = tl.load(rates), tl.load(rates + 1)
    beta1, beta2, eps = tl.load(rates + 2), tl.load(rates + 3), tl.load(rates + 4)
    mean_correction, root_correction = tl.load(rates + 5), tl.load(rates + 6)
    average_weight, clip = tl.load(rates + 7), tl.load(rates + 8)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_weights
    w = tl.load(weight + place, mask=inside, other=0.0)
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(mean + place, mask=inside, other=0.0)
    v = tl.load(square + place, mask=inside, other=0.0)
    a = tl.load(average + place, mask=inside, other=0.0)
    share = clip / (tl.load(norm) + CLIP_EPS)
    # Not a minimum, which would take a norm that is no number for one that need not be clipped.
    g = g * tl.where(share > 1.0, 1.0, share)
    w = tl.where(place < num_decayed, w * (1.0 - learning_rate * weight_decay), w)
    m += (1.0 - beta1) * (g - m)
    v = v * beta2 + (1.0 - beta2) * g * g
    w -= learning_rate / mean_correction * (m / (tl.sqrt(v) / root_correction + eps))
    a += average_weight * (w - a)
    tl.store(weight + place, w, mask=inside)
    tl.store(mean + place, m, mask=inside)
    tl.store(square + place, v, mask=inside)
    tl.store(average + place, a, mask=inside)
    if ROUNDED:
        tl.store(rounded + place, w.to(rounded.dtype.element_ty), mask=inside)


@torch.no_grad()
def fused(flat: Flat, rates: Tensor) -> Tensor:
    """``worker.kernels.adamw.plain`` by these kernels; ValueError unless each buffer is contiguous."""
    buffers = (flat.weight_P, flat.grad_P, flat.mean_P, flat.square_P, flat.average_P)
    rounded_P = flat.weight_P if flat.rounded_P is None else flat.rounded_P
    num_weights = flat.weight_P.numel()
    if any(not each.is_contiguous() or each.numel() != num_weights for each in (*buffers, rounded_P)):
        raise ValueError("buffers of one optimizer are contiguous and of one length")
    device = flat.weight_P.device
    num_sums = triton.cdiv(num_weights, SUMMED)
    sums, norm = torch.empty(num_sums, device=device), torch.empty((), device=device)
    launch(_square, (num_sums,), flat.grad_P, sums, num_weights, SUMMED=SUMMED)
    launch(_root, (1,), sums, norm, num_sums, BLOCK=BLOCK)
    told = (norm, rates.to(device, non_blocking=True), flat.num_decayed, num_weights)
    modes = {"CLIP_EPS": CLIP_EPS, "ROUNDED": flat.rounded_P is not None, "BLOCK": BLOCK}
    launch(_descend, (triton.cdiv(num_weights, BLOCK),), *buffers, rounded_P, *told, **modes)
    return norm
