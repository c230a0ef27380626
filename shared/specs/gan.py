"""What may be asked of a generative adversarial network (Goodfellow et al., 2014, arXiv 1406.2661)."""

from collections.abc import Hashable, Mapping
from math import cos, pi
from typing import Any, ClassVar, Final, Literal

from pydantic import Field, model_validator

from shared.specs.spec import Modality, wrong
from shared.specs.training import Beta, Betas, TrainSpec, Uses

Objective = Literal["non_saturating", "hinge", "wgan_gp", "r3gan"]

OBJECTIVES: Final[Mapping[str, Objective]] = {
    "mlp": "r3gan",
    "dcgan": "non_saturating",
    "sngan": "hinge",
    "r3gan": "r3gan",
}
"""The objective that each network was published with (an MLP's is the default of the family)."""

RECIPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "non_saturating": {"learning_rate": 2e-4, "betas": (0.5, 0.999), "critic_steps": 1},
    "hinge": {"learning_rate": 2e-4, "betas": (0.0, 0.9), "critic_steps": 5},
    "wgan_gp": {"learning_rate": 1e-4, "betas": (0.0, 0.9), "critic_steps": 5},
    "r3gan": {"learning_rate": 2e-4, "betas": (0.0, 0.99), "critic_steps": 1},
}
"""The published optimizer of each objective."""

PENALISED: Final = frozenset({"wgan_gp", "r3gan"})
"""Objectives whose discriminator pays for its gradient."""

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "xs": {"hidden_dim": 256, "base_channels": 32, "num_blocks": 1, "finest_blocks": 0},
    "s": {"hidden_dim": 512, "base_channels": 64, "num_blocks": 1, "finest_blocks": 1},
    "b": {"hidden_dim": 1024, "base_channels": 192, "num_blocks": 2, "finest_blocks": 2},
}
"""Sizes from two CPU cores (``xs``) to one large GPU (``b``)."""


class GanSpec(TrainSpec):
    """Train a generator against a discriminator, or critic, on images.

    What is left out follows from what is given: ``objective`` from ``network``, the optimizer from ``objective``
    (``RECIPES``) and the sizes from ``preset`` (``PRESETS``).
    """

    modality: ClassVar[Modality] = "image"
    tasks: ClassVar[Mapping[str, frozenset[str]]] = {
        "generate": frozenset({"temperature", "labels"}),
        "interpolate": frozenset({"labels"}),
    }
    used_with: ClassVar[Uses] = {
        **TrainSpec.used_with,
        "hidden_dim": {"network": {"mlp"}},
        "base_channels": {"network": {"dcgan", "sngan", "r3gan"}},
        "num_blocks": {"network": {"sngan", "r3gan"}},
        "finest_blocks": {"network": {"r3gan"}},
        "beta2_start": {"objective": {"r3gan"}},
        "gamma": {"objective": {"r3gan"}},
        "gamma_end": {"objective": {"r3gan"}},
        "gradient_penalty": {"objective": {"wgan_gp"}},
        "penalty_every": {"objective": PENALISED},
    }
    architecture: ClassVar[frozenset[str]] = frozenset({
        "preset", "network", "objective", "class_conditional", "latent_dim", "hidden_dim", "base_channels",
        "num_blocks", "finest_blocks",
    })  # fmt: skip

    family: Literal["gan"]
    preset: Literal["xs", "s", "b"] = "xs"
    """Size of the network where the fields below leave it open: from two CPU cores to one large GPU."""
    network: Literal["mlp", "dcgan", "sngan", "r3gan"] = "r3gan"
    """Fully connected; DCGAN (Radford et al., 2015); residual (Miyato et al., 2018); R3GAN (Huang et al., 2024)."""
    objective: Objective = "r3gan"
    """Non-saturating (Goodfellow et al., 2014), hinge with spectral normalisation (Miyato et al., 2018), Wasserstein
    with gradient penalty (Gulrajani et al., 2017), or relativistic pairs with R1 and R2 (Huang et al., 2024). It
    decides how the discriminator is normalised; when left out, the one that the network was published with."""
    class_conditional: bool = True
    """Learn the classes of a dataset that has some: embedded for the generator, projected in the discriminator."""
    latent_dim: int = Field(default=64, ge=1, le=1024)
    """Dimensions of the latent vector z."""
    hidden_dim: int = Field(default=256, ge=8, le=8192)
    """Width of the hidden layers (``mlp`` only)."""
    base_channels: int = Field(default=32, ge=4, le=512)
    """Channels at the finest resolution that is worked at, doubled at each halving up to fourfold (not ``mlp``)."""
    num_blocks: int = Field(default=1, ge=1, le=8)
    """Residual blocks at each resolution (``sngan`` and ``r3gan``)."""
    finest_blocks: int = Field(default=0, ge=0, le=8)
    """Residual blocks at the image's own resolution, where they cost most; without any, the image is read and drawn in
    overlapping patches at half of it (``r3gan`` only)."""
    critic_steps: int = Field(default=1, ge=1, le=100)
    """Steps of the discriminator for one of the generator, which is updated in each step divisible by this."""
    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    """Peak learning rate of AdamW, of both networks."""
    betas: Betas = (0.0, 0.99)
    """Decay of AdamW's averages of the gradient and of its square, from ``burn_in_steps`` on."""
    beta2_start: Beta = 0.9
    """What the second of ``betas`` begins with (``r3gan`` objective only)."""
    grad_clip: float = Field(default=1e6, gt=0, le=1e6)
    """Largest global gradient norm; the default is none, as in the papers."""
    gamma: float = Field(default=1.0, ge=0, le=1e4)
    """Weight of R1 and R2 at the start (``r3gan`` objective only)."""
    gamma_end: float = Field(default=0.1, ge=0, le=1e4)
    """Weight of R1 and R2 from ``burn_in_steps`` on (``r3gan`` objective only)."""
    gradient_penalty: float = Field(default=10.0, ge=0, le=1e4)
    """Weight of the gradient penalty (``wgan_gp`` objective only)."""
    penalty_every: int = Field(default=1, ge=1, le=64)
    """Steps of the discriminator between those in which it pays for its gradient, which then counts as much more: lazy
    regularisation (Karras et al., 2020, arXiv 1912.04958, appendix B). A penalty costs more than the rest of a step
    (``r3gan`` and ``wgan_gp`` objectives only)."""
    augment: float = Field(default=0.0, ge=0, le=1)
    """Probability of each kind of DiffAugment (Zhao et al., 2020) from ``burn_in_steps`` on; it begins at 0."""
    burn_in_steps: int | None = Field(default=None, ge=0, le=10_000_000)
    """Steps over which gamma, beta2 and ``augment`` go from start to end, half a cosine each; when left out half of
    ``steps``."""

    @classmethod
    def derived(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        objective = given.get("objective", OBJECTIVES.get(str(given.get("network", "r3gan")), "r3gan"))
        sizes = PRESETS.get(str(given.get("preset", "xs")), {})
        return {**sizes, **RECIPES.get(str(objective), {}), "objective": objective}

    @model_validator(mode="after")
    def _generator_is_trained(self) -> "GanSpec":
        if self.critic_steps > self.steps:
            raise wrong("critic_steps", "critic_steps must not exceed steps, or the generator is never updated")
        return self

    @model_validator(mode="after")
    def _penalty_falls(self) -> "GanSpec":
        if self.objective == "r3gan" and self.gamma_end > self.gamma:
            raise wrong("gamma_end", "gamma_end must not exceed gamma")
        return self

    @property
    def nhwc_on_cpu(self) -> bool:
        return self.network == "dcgan"

    @property
    def couples_samples(self) -> bool:
        """Under batch normalisation."""
        return self.network in ("dcgan", "sngan")

    @property
    def critic_norm(self) -> Literal["none", "batch", "spectral"]:
        """How the discriminator is normalised. A penalty on a sample's gradient has no meaning under batch norm, which
        makes a logit depend on the other samples; so only an objective without penalty has it."""
        if self.objective == "hinge":
            return "spectral"
        return "batch" if self.objective == "non_saturating" and self.network == "dcgan" else "none"

    def pays_at(self, step: int) -> bool:
        """Whether the discriminator pays for its gradient in ``step``."""
        return self.objective in PENALISED and step % self.penalty_every == 0

    def trains(self, part: str, step: int) -> bool:
        """The generator, in each ``critic_steps``-th step; the discriminator, in every one."""
        return part == "discriminator" or (step + 1) % self.critic_steps == 0

    def betas_at(self, step: int) -> tuple[float, float]:
        """Of the r3gan objective, beta2 begins low: early gradients say little about later ones."""
        if self.objective != "r3gan":
            return self.betas
        return self.betas[0], self._burning_in(self.beta2_start, self.betas[1], step)

    def gamma_at(self, step: int) -> float:
        """Weight of R1 and R2 in ``step``."""
        return self._burning_in(self.gamma, self.gamma_end, step)

    def augment_at(self, step: int) -> float:
        """Probability of each augmentation in ``step``."""
        return self._burning_in(0.0, self.augment, step)

    def decided_by(self, step: int) -> Hashable:
        pays = self.pays_at(step)
        return pays, self.gamma_at(step) if pays and self.objective == "r3gan" else None, self.augment_at(step)

    def _burning_in(self, start: float, end: float, step: int) -> float:
        length = self.steps // 2 if self.burn_in_steps is None else self.burn_in_steps
        done = min(1.0, step / length) if length else 1.0
        return end + (start - end) * (1 + cos(pi * done)) / 2
