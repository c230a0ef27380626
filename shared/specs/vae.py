"""What may be asked of a variational autoencoder (Kingma and Welling, 2013, arXiv 1312.6114)."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from shared.specs.spec import Modality
from shared.specs.training import TrainSpec


class VaeSpec(TrainSpec):
    """Train a VAE on images: ``ELBO = E[log p(x|z)] - beta KL(q(z|x) || p(z))``."""

    modality: ClassVar[Modality] = "image"
    tasks: ClassVar[Mapping[str, frozenset[str]]] = {
        "generate": frozenset({"temperature"}),
        "reconstruct": frozenset(),
        "interpolate": frozenset(),
    }

    family: Literal["vae"]
    network: Literal["mlp", "conv"] = "conv"
    """Fully connected, or convolutional with residual blocks."""
    latent_dim: int = Field(default=16, ge=1, le=1024)
    """Dimensions of the latent vector z."""
    hidden_dim: int = Field(default=400, ge=8, le=8192)
    """Width of the hidden layers (``mlp`` only)."""
    base_channels: int = Field(default=32, ge=4, le=512)
    """Channels after the first halving of the resolution, doubled at each further one (``conv`` only)."""
    beta: float = Field(default=1.0, ge=0, le=1000)
    """Weight of the KL term (Higgins et al., 2017)."""
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    """p(x|z): Bernoulli over grey levels in [0, 1], or Gaussian with one learned variance per model."""
