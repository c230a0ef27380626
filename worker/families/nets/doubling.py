"""The transposed convolution that doubles a resolution.

Shape suffixes: B = batch, C = channels, H, W = height and width.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class DoublingConv(nn.ConvTranspose2d):
    """A transposed 4x4 convolution with stride 2: its kernel covers every output pixel equally, so no checkerboard.

    The bias is added apart: its gradient is a sum, for which oneDNN's bfloat16 kernel takes longer than for the
    gradient of the input.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 4, stride=2, padding=1)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        bias_C: Tensor = self.bias  # pyright: ignore[reportAssignmentType]
        y_BCHW = F.conv_transpose2d(input, self.weight, stride=2, padding=1)
        return y_BCHW + bias_C.to(y_BCHW.dtype)[:, None, None]
