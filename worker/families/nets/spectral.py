"""Spectral normalisation (Miyato et al., 2018, arXiv 1802.05957): weights divided by their largest singular value.

The forward pass is a pure function of the weights and of one stored vector per layer, so a critic may score real, fake
and mixed images, in pieces or at once, with the same weights. The vector moves once a step, in ``power_iterate``.

Shape suffixes: O = rows of a weight seen as a matrix, I = its columns.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

INITIAL_ITERATIONS: Final = 15
"""Enough for a random weight, whose singular values are close together."""


class Spectral(nn.Module):
    """A weight over an estimate of its spectral norm (equation 8), in float32 whatever the autocast."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.left_O: Tensor
        self.register_buffer("left_O", F.normalize(nn.init.normal_(torch.empty(len(weight))), dim=0))
        for _ in range(INITIAL_ITERATIONS):
            self.left_O.copy_(self._iterated(weight.detach())[0])

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            left_O, right_I = self._iterated(weight)
            return weight / (left_O @ weight.flatten(1) @ right_I)

    @torch.no_grad()
    def _iterated(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Left and right singular vectors after one more power iteration (algorithm 1)."""
        matrix_OI = weight.flatten(1)
        right_I = F.normalize(self.left_O @ matrix_OI, dim=0)
        return F.normalize(matrix_OI @ right_I, dim=0), right_I

    @torch.no_grad()
    def advance(self, weight: Tensor, where: Tensor) -> None:
        """Keep the iterated vector if the boolean ``where`` says so, without asking the device."""
        self.left_O.copy_(torch.where(where, self._iterated(weight)[0], self.left_O))


def spectrally_normalised(module: nn.Module) -> nn.Module:
    """``module`` with every weight of its layers normalised."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear | nn.Embedding)]
    for layer in layers:
        if not layer.weight.any():  # zero has no direction to keep
            nn.init.normal_(layer.weight)
        parametrize.register_parametrization(layer, "weight", Spectral(layer.weight))
    return module


def power_iterate(module: nn.Module, where: Tensor) -> None:
    """One iteration of every normalised weight in ``module``, if the boolean ``where`` says so."""
    for layer in module.modules():
        norm = layer[0] if isinstance(layer, parametrize.ParametrizationList) else None
        if isinstance(norm, Spectral) and isinstance(layer.original, Tensor):
            norm.advance(layer.original, where)
