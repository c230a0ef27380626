"""Interpolation along a great circle."""

import torch
import torch.nn.functional as F
from torch import Tensor


def slerp(a_SZ: Tensor, b_SZ: Tensor, t_S1: Tensor) -> Tensor:
    """The point at ``t`` on the great circle from ``a`` to ``b`` (Shoemake, 1985), lengths interpolated too."""
    cosine_S1 = F.cosine_similarity(a_SZ, b_SZ, dim=1)[:, None].clamp(-1, 1)
    angle_S1 = cosine_S1.acos()
    weight_a_S1, weight_b_S1 = ((1 - t_S1) * angle_S1).sin(), (t_S1 * angle_S1).sin()
    curved_SZ = (weight_a_S1 * a_SZ + weight_b_S1 * b_SZ) / angle_S1.sin()
    # Parallel or opposite end points span no circle; the straight line is the limit of the former.
    return torch.where(angle_S1.sin() < 1e-6, a_SZ + t_S1 * (b_SZ - a_SZ), curved_SZ)
