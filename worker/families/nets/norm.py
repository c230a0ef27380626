"""Group normalisation with what surrounds it, and softmax, by the fastest way that a tensor's place and layout allow.

Shape suffixes: B = batch, C = channels, H, W = height and width, X = any leading axes, N = numbers of a row.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from worker.kernels import native


def normalised(norm: nn.GroupNorm, x_BCHW: Tensor, shift_BC: Tensor | None = None, *, silu: bool) -> Tensor:
    """``norm(x + shift)``, and SiLU of it where asked for."""
    if _is_native(x_BCHW) and x_BCHW.shape[1] % native.CHANNELS == 0:
        shift_BC = None if shift_BC is None else shift_BC.float().contiguous()
        manner = _Manner(norm.num_groups, norm.eps, silu)
        y_BCHW: Any = _GroupNorm.apply(x_BCHW, shift_BC, norm.weight.float(), norm.bias.float(), manner)
        return y_BCHW
    y_BCHW = norm(x_BCHW if shift_BC is None else x_BCHW + shift_BC[:, :, None, None])
    return F.silu(y_BCHW) if silu else y_BCHW


def softmax(scores_XN: Tensor, scale: float) -> Tensor:
    """``softmax(scale scores)`` over the last axis, computed in float32."""
    if _suits(scores_XN):
        weights_XN: Any = _Softmax.apply(scores_XN.contiguous(), scale)
        return weights_XN
    return (scores_XN.float() * scale).softmax(-1).to(scores_XN.dtype)


def _is_native(x_BCHW: Tensor) -> bool:
    return x_BCHW.ndim == 4 and x_BCHW.is_contiguous(memory_format=torch.channels_last) and _suits(x_BCHW)


def _suits(x: Tensor) -> bool:
    """Whether the kernels for CPUs take it; torch's compiler joins plain operations with what is around them."""
    is_fit = x.device.type == "cpu" and x.dtype in native.KINDS
    return is_fit and not torch.compiler.is_compiling() and native.is_available()


class _Manner(NamedTuple):
    num_groups: int
    eps: float
    silu: bool


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, shift_BC: Tensor | None, gamma_C: Tensor, beta_C: Tensor, manner: _Manner
    ) -> Tensor:
        y_BCHW, stats_B2G = native.group_norm(x_BCHW, shift_BC, gamma_C, beta_C, **manner._asdict())
        ctx.save_for_backward(x_BCHW, shift_BC, gamma_C, beta_C, stats_B2G)
        ctx.silu = manner.silu
        return y_BCHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BCHW: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_BCHW, shift_BC, gamma_C, beta_C, stats_B2G = ctx.saved_tensors
        dy_BCHW = dy_BCHW.to(x_BCHW.dtype).contiguous(memory_format=torch.channels_last)
        slopes = native.group_norm_backward(x_BCHW, shift_BC, gamma_C, beta_C, stats_B2G, dy_BCHW, silu=ctx.silu)
        return *slopes, None


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_XN: Tensor, scale: float) -> Tensor:
        weights_XN = native.softmax(scores_XN, scale)
        ctx.save_for_backward(weights_XN)
        ctx.scale = scale
        return weights_XN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_XN: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weights_XN,) = ctx.saved_tensors
        return native.softmax_backward(weights_XN, slope_XN.to(weights_XN.dtype).contiguous(), ctx.scale), None
