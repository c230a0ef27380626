"""Variational autoencoder (Kingma and Welling, 2013, arXiv 1312.6114): network, loss, samplers.

Shape suffixes: B = batch, S = slots, C = channels, H, W = height and width of an image,
h, w = of the smallest feature map, F = its channels, Z = latent dimensions.
"""

from collections.abc import Sequence
from math import gcd, log, pi
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.specs.tasks import Generate, Interpolate, Reconstruct
from shared.specs.vae import VaeSpec
from worker.families.family import Batch, DataInfo, Draw, Family, Measured, Score, SlotState
from worker.families.nets.slerp import slerp
from worker.kernels.noise import Noise

SMALLEST_MAP: Final = 8
"""The resolution is halved until the feature map is no larger than this (and at least once)."""
FINEST_VARIANCE: Final = (1 / 255) ** 2
"""No Gaussian likelihood is sharper than a grey level, or its density would have no bound."""


# Network -----------------------------------------------------------------------------------------


def mlp_encoder(spec: VaeSpec, data: DataInfo) -> nn.Module:
    """Grey levels to the posterior's mean and log variance; one hidden layer, as in the paper."""
    num_pixels = torch.Size(data.shape).numel()
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(num_pixels, spec.hidden_dim),
        nn.ReLU(),
        nn.Linear(spec.hidden_dim, 2 * spec.latent_dim),
    )


def mlp_decoder(spec: VaeSpec, data: DataInfo) -> nn.Module:
    """A latent to the parameters of p(x|z); one hidden layer, as in the paper."""
    num_pixels = torch.Size(data.shape).numel()
    return nn.Sequential(
        nn.Linear(spec.latent_dim, spec.hidden_dim),
        nn.ReLU(),
        nn.Linear(spec.hidden_dim, num_pixels),
        nn.Unflatten(1, data.shape),
    )


def norm_silu(channels: int) -> nn.Module:
    """Group norm and SiLU: no statistic crosses the batch, so a sample never depends on its neighbours."""
    return nn.Sequential(nn.GroupNorm(gcd(8, channels), channels), nn.SiLU())


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions around a skip; the identity before training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm_silu(channels), norm_silu(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.conv2(self.norm2(self.conv1(self.norm1(x_BCHW))))


def num_halvings(shape: tuple[int, ...]) -> int:
    """How often the resolution is halved on the way to the latent."""
    resolution, halvings = max(shape[1:]), 0
    while resolution > SMALLEST_MAP or halvings == 0:
        resolution, halvings = -(-resolution // 2), halvings + 1
    return halvings


def smallest_map(spec: VaeSpec, data: DataInfo) -> tuple[int, int, int]:
    """Shape ``(F, h, w)`` of the feature map next to the latent, for images padded up to it."""
    halvings = num_halvings(data.shape)
    h, w = (-(-size // 2**halvings) for size in data.shape[1:])
    return spec.base_channels * 2 ** (halvings - 1), h, w


class ConvEncoder(nn.Module):
    """Strided 4x4 convolutions with a residual block at each resolution, then one linear layer."""

    def __init__(self, spec: VaeSpec, data: DataInfo) -> None:
        super().__init__()
        (channels_in, height, width), halvings = data.shape, num_halvings(data.shape)
        map_shape_Fhw = _, h, w = smallest_map(spec, data)
        self.padding = (0, (w << halvings) - width, 0, (h << halvings) - height)
        layers: list[nn.Module] = []
        channels = spec.base_channels
        for _ in range(halvings):
            layers += [nn.Conv2d(channels_in, channels, 4, stride=2, padding=1), ResidualBlock(channels)]
            channels_in, channels = channels, 2 * channels
        self.body = nn.Sequential(*layers, norm_silu(channels_in))
        self.head = nn.Linear(torch.Size(map_shape_Fhw).numel(), 2 * spec.latent_dim)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        padded_BCHW = F.pad(x_BCHW, self.padding, mode="replicate") if any(self.padding) else x_BCHW
        return self.head(self.body(padded_BCHW).flatten(1))


class ConvDecoder(nn.Module):
    """The encoder's mirror: a linear layer, then residual blocks and transposed convolutions."""

    def __init__(self, spec: VaeSpec, data: DataInfo) -> None:
        super().__init__()
        self.image_shape_CHW = data.shape
        self.map_shape_Fhw = smallest_map(spec, data)
        self.head = nn.Linear(spec.latent_dim, torch.Size(self.map_shape_Fhw).numel())
        layers: list[nn.Module] = []
        channels = self.map_shape_Fhw[0]
        for halving in reversed(range(num_halvings(data.shape))):
            channels_out = channels // 2 if halving else data.shape[0]
            # A 4x4 kernel with stride 2 covers every output pixel equally: no checkerboard.
            up = nn.ConvTranspose2d(channels, channels_out, 4, stride=2, padding=1)
            layers += [ResidualBlock(channels), norm_silu(channels), up]
            channels = channels_out
        self.body = nn.Sequential(*layers)

    def forward(self, z_BZ: Tensor) -> Tensor:
        _, height, width = self.image_shape_CHW
        map_BFhw = self.head(z_BZ).unflatten(1, self.map_shape_Fhw)
        return self.body(map_BFhw)[:, :, :height, :width]


class Vae(nn.Module):
    """q(z|x) and p(x|z)."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.log_variance = nn.Parameter(torch.tensor(log(0.1)))
        """Of the Gaussian likelihood; unused by the Bernoulli."""

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z|x), float32 ``(B, Z)`` each."""
        mean_BZ, log_variance_BZ = self.encoder(x_BCHW).float().chunk(2, dim=1)
        return mean_BZ, log_variance_BZ

    def decode(self, z_BZ: Tensor) -> Tensor:
        """Parameters of p(x|z), float32 ``(B, C, H, W)``: Bernoulli logits or Gaussian means."""
        return self.decoder(z_BZ).float()


def build(spec: VaeSpec, data: DataInfo) -> Vae:
    """A network for images of ``data.shape``."""
    if spec.network == "mlp":
        return Vae(mlp_encoder(spec, data), mlp_decoder(spec, data))
    return Vae(ConvEncoder(spec, data), ConvDecoder(spec, data))


# Loss --------------------------------------------------------------------------------------------


def grey_levels(image_BCHW: Tensor) -> Tensor:
    """Bytes as float32 in [0, 1]."""
    return image_BCHW.float() / 255


def kl_by_dimension(mean_BZ: Tensor, log_variance_BZ: Tensor) -> Tensor:
    """KL(q(z|x) || N(0, 1)) in nats of each dimension (appendix B of the paper)."""
    return 0.5 * (mean_BZ**2 + log_variance_BZ.exp() - 1 - log_variance_BZ)


def kl_divergence(mean_BZ: Tensor, log_variance_BZ: Tensor) -> Tensor:
    """KL(q(z|x) || N(0, 1)) in nats per image."""
    return kl_by_dimension(mean_BZ, log_variance_BZ).sum(1)


def negative_log_likelihood(spec: VaeSpec, net: Vae, decoded_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
    """-log p(x|z) in nats per image."""
    if spec.likelihood == "bernoulli":
        nats_BCHW = F.binary_cross_entropy_with_logits(decoded_BCHW, x_BCHW, reduction="none")
    else:
        variance = FINEST_VARIANCE + net.log_variance.exp()
        nats_BCHW = 0.5 * ((x_BCHW - decoded_BCHW) ** 2 / variance + (2 * pi * variance).log())
    return nats_BCHW.flatten(1).sum(1)


def loss(spec: VaeSpec, net: Vae, batch: Batch, noise: Noise) -> Measured:
    """The negative of ``E[log p(x|z)] - beta KL``, one latent per image (equations 3 and 10)."""
    x_BCHW = grey_levels(batch["image"])
    mean_BZ, log_variance_BZ = net.encode(x_BCHW)
    z_BZ = mean_BZ + (0.5 * log_variance_BZ).exp() * noise.normal(spec.latent_dim)
    reconstruction = negative_log_likelihood(spec, net, net.decode(z_BZ), x_BCHW).mean()
    kl = kl_divergence(mean_BZ, log_variance_BZ).mean()
    values = {"elbo": -(reconstruction + kl), "reconstruction": reconstruction, "kl": kl}
    return Measured(loss=reconstruction + spec.beta * kl, values=values)


# Scores ------------------------------------------------------------------------------------------


def elbo(spec: VaeSpec, net: Vae, batch: Batch, noise: Noise) -> Tensor:
    """A lower bound of log p(x) in nats per image ``(B,)``, from one latent (equation 10)."""
    x_BCHW = grey_levels(batch["image"])
    mean_BZ, log_variance_BZ = net.encode(x_BCHW)
    z_BZ = mean_BZ + (0.5 * log_variance_BZ).exp() * noise.normal(spec.latent_dim)
    return -negative_log_likelihood(spec, net, net.decode(z_BZ), x_BCHW) - kl_divergence(mean_BZ, log_variance_BZ)


def iwae(spec: VaeSpec, net: Vae, batch: Batch, noise: Noise, *, num_latents: int = 64) -> Tensor:
    """The tighter bound ``log mean p(x, z) / q(z|x)`` over latents, in nats per image (Burda et al., 2015)."""
    x_BCHW = grey_levels(batch["image"])
    mean_BZ, log_variance_BZ = net.encode(x_BCHW)
    log_weights: list[Tensor] = []
    for stream in range(num_latents):
        epsilon_BZ = noise.normal(spec.latent_dim, stream=stream)
        z_BZ = mean_BZ + (0.5 * log_variance_BZ).exp() * epsilon_BZ
        # The two normal densities; their constants cancel.
        log_ratio_B = 0.5 * (epsilon_BZ**2 + log_variance_BZ - z_BZ**2).sum(1)
        log_weights.append(log_ratio_B - negative_log_likelihood(spec, net, net.decode(z_BZ), x_BCHW))
    return torch.stack(log_weights).logsumexp(0) - log(num_latents)


def kl_of_dimensions(_spec: VaeSpec, net: Vae, batch: Batch, _noise: Noise) -> Tensor:
    """KL(q(z|x) || N(0, 1)) of each latent dimension in nats, ``(B, Z)``."""
    return kl_by_dimension(*net.encode(grey_levels(batch["image"])))


def posterior_mean(_spec: VaeSpec, net: Vae, batch: Batch, _noise: Noise) -> Tensor:
    """The mean of q(z|x), ``(B, Z)``."""
    return net.encode(grey_levels(batch["image"]))[0]


# Samplers ----------------------------------------------------------------------------------------


class Decode:
    """What the three samplers share: one step, in which latents ``z`` become images ``x``."""

    def __init__(self, spec: VaeSpec, data: DataInfo) -> None:
        self.spec = spec

    def num_steps(self, request: object) -> int:
        return 1

    def step(self, net: Vae, state: SlotState, noise: Noise) -> SlotState:
        """Decode to the mean of p(x|z)."""
        decoded_SCHW = net.decode(state["z"])
        x_SCHW = decoded_SCHW.sigmoid() if self.spec.likelihood == "bernoulli" else decoded_SCHW
        return state | {"x": x_SCHW}

    def finish(self, state: SlotState) -> Tensor:
        return (state["x"].clamp(0, 1) * 255).round().to(torch.uint8)


class FromPrior(Decode):
    """Draws from N(0, temperature^2) and decodes."""

    def start(self, draws: Sequence[Draw[Generate]], noise: Noise) -> SlotState:
        temperature_S = torch.tensor([draw.request.temperature for draw in draws], device=noise.device)
        return {"z": temperature_S[:, None] * noise.normal(self.spec.latent_dim)}


class AlongPaths(Decode):
    """Decodes points between pairs of latents; the ends of pair ``p`` are the samples 2p and 2p + 1 of a seed."""

    def start(self, draws: Sequence[Draw[Interpolate]], noise: Noise) -> SlotState:
        pairs, points = zip(*(divmod(draw.index, draw.request.num_points) for draw in draws), strict=True)
        last_points = [draw.request.num_points - 1 for draw in draws]
        t_S = torch.tensor(points, device=noise.device) / torch.tensor(last_points, device=noise.device)
        a_SZ = noise.at([2 * pair for pair in pairs]).normal(self.spec.latent_dim)
        b_SZ = noise.at([2 * pair + 1 for pair in pairs]).normal(self.spec.latent_dim)
        return {"z": slerp(a_SZ, b_SZ, t_S[:, None])}


class FromPosterior(Decode):
    """Encodes images to the mean of q(z|x) and decodes that."""

    def start(self, draws: Sequence[Draw[Reconstruct]], noise: Noise) -> SlotState:
        images = [draw.inputs["image"] for draw in draws if draw.inputs is not None]
        return {"image": torch.stack(images).to(noise.device)}

    def step(self, net: Vae, state: SlotState, noise: Noise) -> SlotState:
        """Both halves of the network at once."""
        mean_SZ, _ = net.encode(grey_levels(state["image"]))
        return super().step(net, state | {"z": mean_SZ}, noise)


FAMILY: Final = Family(
    spec=VaeSpec,
    build=build,
    losses={"vae": loss},
    tasks={"generate": FromPrior, "interpolate": AlongPaths, "reconstruct": FromPosterior},
    scores={
        "elbo": Score(values=elbo),
        "iwae64": Score(values=iwae),
        "kl": Score(values=kl_of_dimensions, kind="dimensions"),
        "active_units": Score(values=posterior_mean, kind="variation"),
    },
)
