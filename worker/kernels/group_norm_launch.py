"""Launches of Triton's group normalisation: how an image is cut into tiles, and the derivative for autograd.

Shape suffixes: B = batch, S = pieces, C = channels, G = groups, H, W = height and width.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from worker.kernels.choice import launch
from worker.kernels.group_norm import Modulation, Norm
from worker.kernels.group_norm_triton import (
    apply,
    apply_slopes,
    measure,
    measure_slopes,
    settle,
    settle_slopes,
)

TILE: Final = 4096
"""Numbers that a program holds of each tensor."""
MOST_CHANNELS: Final = 64
PIECES: Final = 32
"""That are put together at once."""
MOST_PIECES: Final = 65_535
"""Of an image: CUDA's bound on the second dimension of a grid."""


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """How images of ``(C, N)`` are cut into tiles."""

    num_pixels: int
    num_channels: int
    num_groups: int
    wide: torch.dtype

    @classmethod
    def of(cls, x_BCHW: Tensor, num_groups: int) -> "_Cut":
        num_channels, height, width = x_BCHW.shape[1:]
        wide = torch.promote_types(x_BCHW.dtype, torch.float32)
        return cls(num_pixels=height * width, num_channels=num_channels, num_groups=num_groups, wide=wide)

    @property
    def channels(self) -> int:
        return min(triton.next_power_of_2(self.num_channels), MOST_CHANNELS)

    @property
    def pixels(self) -> int:
        return min(triton.next_power_of_2(self.num_pixels), TILE // self.channels)

    @property
    def num_pieces(self) -> int:
        return triton.cdiv(self.num_pixels, self.pixels)

    @property
    def grid(self) -> tuple[int, int]:
        return self.num_pieces, triton.cdiv(self.num_channels, self.channels)

    @property
    def tiled(self) -> dict[str, Any]:
        return {"PIXELS": self.pixels, "CHANNELS": self.channels, "WIDE": self._wide}

    @property
    def grouped(self) -> dict[str, Any]:
        per_group = self.num_channels // self.num_groups
        members = triton.next_power_of_2(per_group)
        sizes = {"PIECES": PIECES, "PER_GROUP": per_group, "MEMBERS": members}
        return sizes | {"WIDE": self._wide}

    @property
    def _wide(self) -> Any:
        return tl.float64 if self.wide == torch.float64 else tl.float32

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        return torch.empty(len(like), *shape, device=like.device, dtype=self.wide)

    @property
    def applied(self) -> dict[str, Any]:
        return self.tiled | {"PER_GROUP": self.num_channels // self.num_groups}


def _in_layout(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.contiguous(memory_format=torch.channels_last)


def _forward(x: Tensor, norm: Norm, modulation: Modulation | None) -> tuple[Tensor, Tensor, Tensor]:
    """y, and each group's mean and reciprocal deviation ``(B, G)``."""
    cut = _Cut.of(x, norm.num_groups)
    sizes = (cut.num_pixels, cut.num_channels)
    means, squares = (cut.empty(x, cut.num_pieces, cut.num_channels) for _ in range(2))
    mean, rstd = (cut.empty(x, cut.num_groups) for _ in range(2))
    y = torch.empty_like(x, memory_format=torch.channels_last)
    scale, shift = modulation or (norm.weight_C, norm.weight_C)
    learnt = (mean, rstd, norm.weight_C, norm.bias_C, scale, shift)
    launch(measure, (len(x), *cut.grid), x, means, squares, *sizes, **cut.tiled)
    settled = (means, squares, mean, rstd, *sizes, cut.num_pieces, norm.eps)
    launch(settle, (len(x), cut.num_groups), *settled, PIXELS=cut.pixels, **cut.grouped)
    mode = {"MODULATED": modulation is not None}
    launch(apply, (len(x), *cut.grid), x, y, *learnt, *sizes, cut.num_groups, **mode, **cut.applied)
    return y, mean, rstd


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        x: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        scale_BC: Tensor | None,
        shift_BC: Tensor | None,
        num_groups: int,
        eps: float,
    ) -> Tensor:
        modulation = None if scale_BC is None or shift_BC is None else Modulation(scale_BC, shift_BC)
        y, mean, rstd = _forward(x, Norm(weight_C, bias_C, num_groups, eps), modulation)
        ctx.save_for_backward(x, weight_C, bias_C, scale_BC, shift_BC, mean, rstd)
        ctx.num_groups = num_groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dy = _in_layout(slopes[0])
        x, weight_C, bias_C, scale_BC, shift_BC, mean, rstd = ctx.saved_tensors
        is_modulated = scale_BC is not None
        cut = _Cut.of(x, ctx.num_groups)
        sizes = (cut.num_pixels, cut.num_channels)
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        sums, products = (cut.empty(x, cut.num_pieces, cut.num_channels) for _ in range(2))
        sum_BC, product_BC = (cut.empty(x, cut.num_channels) for _ in range(2))
        mean_sum, mean_product = (cut.empty(x, cut.num_groups) for _ in range(2))
        scale, shift = (scale_BC, shift_BC) if is_modulated else (weight_C, weight_C)
        learnt = (mean, rstd, weight_C, bias_C, scale, shift)
        rest = (*learnt, *sizes, cut.num_groups)
        mode = {"MODULATED": is_modulated}
        launch(measure_slopes, (len(x), *cut.grid), x, dy, sums, products, *rest, **mode, **cut.applied)
        settled = (sums, products, sum_BC, product_BC, mean_sum, mean_product, weight_C, scale, *sizes, cut.num_pieces)
        launch(settle_slopes, (len(x), cut.num_groups), *settled, **mode, **cut.grouped)
        launch(apply_slopes, (len(x), *cut.grid), x, dy, dx, mean_sum, mean_product, *rest, **mode, **cut.applied)
        return dx, *_of_parameters(sum_BC, product_BC, weight_C, bias_C, scale_BC, shift_BC), None, None


def _of_parameters(
    sum_BC: Tensor,
    product_BC: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    scale_BC: Tensor | None,
    shift_BC: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients by weight, bias, scale and shift, from the sums over each image."""
    if scale_BC is None or shift_BC is None:
        return product_BC.sum(0).to(weight_C.dtype), sum_BC.sum(0).to(bias_C.dtype), None, None
    factor_BC = 1 + scale_BC.to(sum_BC.dtype)
    return (
        (factor_BC * product_BC).sum(0).to(weight_C.dtype),
        (factor_BC * sum_BC).sum(0).to(bias_C.dtype),
        (weight_C * product_BC + bias_C * sum_BC).to(scale_BC.dtype),
        sum_BC.to(shift_BC.dtype),
    )


def fits(x_BCHW: Tensor) -> bool:
    """Whether the images are small enough for these kernels: 2,047 by 2,047 pixels of 64 channels or more are."""
    return _Cut.of(x_BCHW, 1).num_pieces <= MOST_PIECES


def fused(x_BCHW: Tensor, norm: Norm, modulation: Modulation | None = None) -> Tensor:
    """``worker.kernels.group_norm.plain`` by these kernels, in channels-last layout; a second derivative is refused."""
    if x_BCHW.shape[1] % norm.num_groups:
        raise ValueError(f"{x_BCHW.shape[1]} channels do not make {norm.num_groups} groups")
    scale_BC, shift_BC = modulation or (None, None)
    given = (None if each is None else each.contiguous() for each in (scale_BC, shift_BC))
    return _Fused.apply(
        _in_layout(x_BCHW), norm.weight_C.contiguous(), norm.bias_C.contiguous(), *given, norm.num_groups, norm.eps
    )
