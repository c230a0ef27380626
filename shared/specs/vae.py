"""What may be asked of a variational autoencoder (Kingma and Welling, 2013, arXiv 1312.6114)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal

from pydantic import Field

from shared.specs.spec import Direction, Modality, wrong
from shared.specs.tasks import Request, Traverse
from shared.specs.training import TrainSpec, Uses

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "xs": {"latent_dim": 16, "hidden_dim": 400, "base_channels": 32},
    "s": {"latent_dim": 32, "hidden_dim": 1024, "base_channels": 64},
    "b": {"latent_dim": 128, "hidden_dim": 4096, "base_channels": 192},
}
"""Sizes from two CPU cores (``xs``) to one large GPU (``b``)."""

CELL_DIM: Final = 16
"""``latent_dim`` of a ladder of any preset: it has many cells, and more of them with each halving."""


class VaeSpec(TrainSpec):
    """Train a VAE on images: ``ELBO = E[log p(x|z)] - beta KL(q(z|x) || p(z))``.

    What is left out of the sizes follows from ``preset`` (``PRESETS``).
    """

    modality: ClassVar[Modality] = "image"
    tasks: ClassVar[Mapping[str, frozenset[str]]] = {
        "generate": frozenset({"temperature"}),
        "reconstruct": frozenset(),
        "encode": frozenset(),
        "interpolate": frozenset(),
        "traverse": frozenset(),
    }
    used_with: ClassVar[Uses] = {
        **TrainSpec.used_with,
        "corruption": {"objective": {"denoising"}},
        "beta": {"objective": {"vae"}},
        "hidden_dim": {"network": {"mlp"}},
        "base_channels": {"network": {"conv", "ladder"}},
    }
    architecture: ClassVar[frozenset[str]] = frozenset({
        "preset", "network", "latent_dim", "hidden_dim", "base_channels", "likelihood",
    })  # fmt: skip

    family: Literal["vae"]
    preset: Literal["xs", "s", "b"] = "xs"
    """Size of the network where the fields below leave it open: from two CPU cores to one large GPU."""
    objective: Literal["vae", "denoising"] = "vae"
    """The ELBO, or reconstruction of clean images from noisy ones, which makes codes and no prior to draw them from."""
    corruption: float = Field(default=0.3, ge=0, le=10)
    """Standard deviation of the noise on grey levels in [0, 1] (``denoising`` only)."""
    network: Literal["mlp", "conv", "ladder"] = "conv"
    """Fully connected, convolutional with residual blocks, or a hierarchy of latents from the top down."""
    latent_dim: int = Field(default=16, ge=1, le=1024)
    """Dimensions of the latent vector z; of each cell of each group of a ``ladder``."""
    hidden_dim: int = Field(default=400, ge=8, le=8192)
    """Width of the hidden layers (``mlp`` only)."""
    base_channels: int = Field(default=32, ge=4, le=512)
    """Channels after the first halving of the resolution, doubled at each further one (``conv``); channels everywhere
    (``ladder``)."""
    beta: float = Field(default=1.0, ge=0, le=1000)
    """Weight of the KL term (Higgins et al., 2017; not ``denoising``)."""
    likelihood: Literal["bernoulli", "gaussian", "logistic"] = "bernoulli"
    """p(x|z): Bernoulli over grey levels in [0, 1], or Gaussian or discretised logistic with one learned variance per
    model; with ``logistic`` the ELBO bounds the probability of the bytes, comparable in bits per dimension."""

    @classmethod
    def derived(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        sizes = PRESETS.get(str(given.get("preset", "xs")), {})
        return {**sizes, "latent_dim": CELL_DIM} if given.get("network") == "ladder" else sizes

    @property
    def nhwc_on_cpu(self) -> bool:
        return self.network == "conv"

    @property
    def repeats_blocks(self) -> bool:
        return self.network != "mlp"

    @property
    def can_draw(self) -> bool:
        return self.objective == "vae"

    def compared_by(self) -> Mapping[str, Direction]:
        """The loss and what it is made of; bits per dimension where the likelihood is one of bytes."""
        figures: dict[str, Direction] = {"loss": "lower", "reconstruction": "lower"}
        if self.objective == "vae":
            figures["elbo"] = "higher"
        if self.bounds_bytes:
            figures["bits_per_dim"] = "lower"
        return figures

    @property
    def bounds_bytes(self) -> bool:
        """Whether the ELBO bounds the probability of bytes, so that bits per dimension are comparable."""
        return self.objective == "vae" and self.likelihood == "logistic"

    def scores_on(self, data: Mapping[str, Any], info: Mapping[str, Any]) -> frozenset[str]:
        """Bounds of the likelihood and what they are made of, of a model of the probability of images."""
        if self.objective == "denoising":
            return frozenset({"active_units"})
        bits = {"bits_per_dim"} if self.bounds_bytes else set[str]()
        return frozenset({"elbo", "iwae64", "kl", "active_units"} | bits)

    def check_task(self, request: Request, info: Mapping[str, Any]) -> None:
        """Refuse to draw from a denoising autoencoder, and latents that there are not; else as any family."""
        super().check_task(request, info)
        if self.objective == "denoising" and request.task not in ("encode", "reconstruct"):
            raise wrong("task", "a denoising autoencoder has no prior: it can encode and reconstruct")
        if isinstance(request, Traverse) and request.num_dimensions > self.latent_dim:
            raise wrong("num_dimensions", f"the model has {self.latent_dim} latent dimensions")
