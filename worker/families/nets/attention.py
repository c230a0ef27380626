"""Scaled dot-product attention without a mask. Shape suffixes: B = batch, K = heads, N = tokens, d = of a head."""

from typing import Final

import torch.nn.functional as F
from torch import Tensor

from worker.families.nets.norm import softmax

FEW_TOKENS: Final = 256
"""Up to so many tokens a CPU is faster with plain products: at 49 tokens the fused kernel's backward pass in bf16 takes
three times as long, measured on one with AMX."""


def attend(q_BKNd: Tensor, k_BKNd: Tensor, v_BKNd: Tensor) -> Tensor:
    """``softmax(q k / sqrt(d)) v`` (Vaswani et al., 2017, equation 1), of the shape of ``q``."""
    if q_BKNd.device.type != "cpu" or k_BKNd.shape[2] > FEW_TOKENS:
        return F.scaled_dot_product_attention(q_BKNd, k_BKNd, v_BKNd)
    return softmax(q_BKNd @ k_BKNd.transpose(2, 3), q_BKNd.shape[3] ** -0.5) @ v_BKNd
