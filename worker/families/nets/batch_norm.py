"""Batch normalisation without running statistics (Ioffe and Szegedy, 2015, arXiv 1502.03167).

Running statistics belong to the raw weights. Averaged weights have other, smaller activations, and normalised with the
raw ones' statistics they draw grey mush. So outside training the statistics are computed again, with the weights that
are there, from reference latents that are a part of the model (virtual batch normalisation, Salimans et al., 2016,
arXiv 1606.03498): a sample depends on its own latent and on the model alone.

Shape suffixes: B = batch, R = the reference and the batch, C = channels, H, W = height and width, Z = latent.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_REFERENCES: Final = 64
"""Latents that the statistics are computed from outside training."""
EPSILON: Final = 1e-5


class BatchNorm(nn.Module):
    """Normalises channels over the batch that is there, in training and outside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain_C = nn.Parameter(torch.ones(channels))
        self.bias_C = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.batch_norm(x_BCHW, None, None, self.gain_C, self.bias_C, training=True, eps=EPSILON)


class ReferenceBatchNorm(BatchNorm):
    """Outside training, normalises with the statistics of the first rows, which are the reference."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.training:
            return super().forward(x_BCHW)
        variance_C11, mean_C11 = torch.var_mean(x_BCHW[:NUM_REFERENCES].float(), (0, 2, 3), correction=0, keepdim=True)
        # Operations that round the same way in every slot of a tile: no reciprocal square root.
        normalised_BCHW = (x_BCHW - mean_C11) / (variance_C11 + EPSILON).sqrt()
        return normalised_BCHW * self.gain_C[:, None, None] + self.bias_C[:, None, None]


class Referenced(nn.Module):
    """A generator with ``ReferenceBatchNorm``, accompanied outside training by its reference latents."""

    def __init__(self, body: nn.Module, latent_dim: int, num_classes: int) -> None:
        super().__init__()
        self.body = body
        self.z_RZ: Tensor
        self.label_R: Tensor
        self.register_buffer("z_RZ", nn.init.normal_(torch.empty(NUM_REFERENCES, latent_dim)))
        self.register_buffer("label_R", torch.arange(NUM_REFERENCES) % max(1, num_classes))

    def forward(self, z_BZ: Tensor, label_B: Tensor | None) -> Tensor:
        """Images in [-1, 1]."""
        if self.training:
            return self.body(z_BZ, label_B).float().tanh()
        label_RB = None if label_B is None else torch.cat((self.label_R, label_B))
        return self.body(torch.cat((self.z_RZ, z_BZ)), label_RB)[NUM_REFERENCES:].float().tanh()
