"""Diffusion in the latents of a trained autoencoder that stays as it is (Rombach et al., 2022, "latent diffusion",
arXiv 2112.10752).

Shape suffixes: B = batch, C = channels, H, W = height and width, of images or of latents.
"""

from typing import Protocol

import torch
from torch import Tensor

from shared.specs.diffusion import DiffusionSpec
from worker.families.family import DataInfo
from worker.families.nets.denoiser import AnyObjective, Denoiser, Network, to_bytes


class Autoencoder(Protocol):
    """What a network offers that others can be built on. Its latents are maps; a vector is a map of one cell."""

    latent_shape: tuple[int, int, int]
    """``(C, H, W)`` of a latent."""

    def latent_of(self, image_BCHW: Tensor) -> Tensor:
        """Latents of bytes, float32 ``(B, *latent_shape)``: without noise, as they are before quantisation."""
        ...

    def image_of(self, latent_BCHW: Tensor) -> Tensor:
        """Images of latents, about [-1, 1]."""
        ...


def space_of(spec: DiffusionSpec, data: DataInfo) -> tuple[int, ...]:
    """Shape ``(C, H, W)`` of what is denoised: images, or their latents."""
    if spec.autoencoder is None:
        return data.shape
    with torch.device("meta"):  # its shapes alone
        return data.models["autoencoder"].network().latent_shape


class LatentDenoiser(Denoiser):
    """D(x; sigma) of latents, shifted and scaled to mean 0 and the deviation that the objective reckons with.

    Theirs are taken from the first training batch, over all its numbers (appendix G of the paper; there the mean
    stays). One scale for all, so that channels keep their weights among each other: a VAE's unused ones stay small.
    """

    autoencoder: Autoencoder

    def __init__(
        self, network: Network, objective: AnyObjective, num_classes: int, autoencoder: Autoencoder, deviation: float
    ) -> None:
        super().__init__(network, objective, num_classes)
        self.autoencoder, self.wanted_deviation = autoencoder, deviation
        self.mean: Tensor
        self.deviation: Tensor
        self.has_begun: Tensor
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("deviation", torch.tensor(1.0))
        self.register_buffer("has_begun", torch.tensor(False))  # noqa: FBT003 (a tensor of it)

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        with torch.autocast(image_BCHW.device.type, enabled=False):
            latent_BCHW = self.autoencoder.latent_of(image_BCHW).double()
        if self.training and not self.has_begun:
            self._begin(latent_BCHW)
        return (latent_BCHW - self.mean) * self._scale()

    def decode(self, x_BCHW: Tensor) -> Tensor:
        return to_bytes(self.autoencoder.image_of((x_BCHW / self._scale() + self.mean).float()))

    def _begin(self, latent_BCHW: Tensor) -> None:
        self.mean.copy_(latent_BCHW.mean())
        self.deviation.copy_(latent_BCHW.std(correction=0).clamp(min=torch.finfo(torch.float32).tiny))
        self.has_begun.fill_(True)  # noqa: FBT003 (torch's own signature)

    def _scale(self) -> Tensor:
        return self.wanted_deviation / self.deviation.double()
