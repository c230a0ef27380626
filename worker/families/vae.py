"""Variational autoencoder (Kingma and Welling, 2013, arXiv 1312.6114): network, loss, scores,
samplers.

Shape suffixes: B = batch, S = slots, C = channels, H, W = height and width of an image, Z = latent dimensions.
"""

from collections import OrderedDict
from collections.abc import Sequence
from math import log, pi, prod
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.specs.tasks import Encode, Generate, Interpolate, Reconstruct, Traverse
from shared.specs.vae import VaeSpec
from worker.families.family import Batch, DataInfo, Draw, Family, Measured, Score, SlotState
from worker.families.nets.halving import Doubling, Halving, map_shape
from worker.families.nets.slerp import slerp
from worker.families.nets.vae_ladder import BottomUp, TopDown, group_shapes
from worker.kernels.noise import Noise

SMALLEST_MAP: Final = 8
"""The resolution is halved until the feature map is no larger than this (and at least once)."""
FINEST_VARIANCE: Final = (1 / 255) ** 2
"""No likelihood is sharper than a grey level, or a Gaussian's density would have no bound."""
HALF_A_LEVEL: Final = 1 / 510
"""Half the distance between two grey levels."""


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


def num_halvings(shape: tuple[int, ...]) -> int:
    """How often the resolution is halved on the way to the latent."""
    resolution, halvings = max(shape[1:]), 0
    while resolution > SMALLEST_MAP or halvings == 0:
        resolution, halvings = -(-resolution // 2), halvings + 1
    return halvings


def conv_encoder(spec: VaeSpec, data: DataInfo) -> nn.Module:
    """Halvings, then one linear layer to the posterior's mean and log variance."""
    coder = (data.shape, num_halvings(data.shape), spec.base_channels)
    head = nn.Linear(prod(map_shape(*coder)), 2 * spec.latent_dim)
    return nn.Sequential(OrderedDict(map=Halving(*coder), flat=nn.Flatten(), head=head))


def conv_decoder(spec: VaeSpec, data: DataInfo) -> nn.Module:
    """The encoder's mirror: a linear layer, then doublings."""
    coder = (data.shape, num_halvings(data.shape), spec.base_channels)
    head = nn.Linear(spec.latent_dim, prod(map_shape(*coder)))
    return nn.Sequential(OrderedDict(head=head, map=nn.Unflatten(1, map_shape(*coder)), image=Doubling(*coder)))


class Vae(nn.Module):
    """q(z|x) and p(x|z)."""

    def __init__(self, spec: VaeSpec, data: DataInfo, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.likelihood = spec.likelihood
        self.latent_shape = (latent_size(spec, data.shape), 1, 1)
        self.log_variance = nn.Parameter(torch.tensor(log(0.1)))
        """Of the Gaussian and the logistic likelihood; unused by the Bernoulli."""

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z|x), float32 ``(B, Z)`` each."""
        mean_BZ, log_variance_BZ = self.encoder(x_BCHW).float().chunk(2, dim=1)
        return mean_BZ, log_variance_BZ

    def infer(self, x_BCHW: Tensor, epsilon_BZ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A latent that N(0, 1) noise draws from q(z|x), and the mean and log variance it was drawn with."""
        mean_BZ, log_variance_BZ = self.encode(x_BCHW)
        return mean_BZ + (0.5 * log_variance_BZ).exp() * epsilon_BZ, mean_BZ, log_variance_BZ

    def decode(self, z_BZ: Tensor) -> Tensor:
        """Parameters of p(x|z), float32 ``(B, C, H, W)``: Bernoulli logits, or means."""
        return self.decoder(z_BZ).float()

    # For models that are built on this one (``worker.families.nets.latents``).

    def latent_of(self, image_BCHW: Tensor) -> Tensor:
        """The mean of q(z|x) of bytes, ``(B, Z, 1, 1)``."""
        return self.encode(grey_levels(image_BCHW))[0][:, :, None, None]

    def image_of(self, latent_BZ11: Tensor) -> Tensor:
        """The mean of p(x|z), about [-1, 1]."""
        return 2 * mean_image(self.likelihood, self.decode(latent_BZ11.flatten(1))) - 1


class Ladder(Vae):
    """A hierarchy of latents, in units of their priors: so it is a VAE whose posterior is drawn from group by group."""

    encoder: BottomUp
    decoder: TopDown

    def encode(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of each group's posterior, given the means above it."""
        num_latents = sum(prod(shape) for shape in self.decoder.group_shapes)
        _, mean_BZ, log_variance_BZ = self.infer(x_BCHW, x_BCHW.new_zeros(len(x_BCHW), num_latents))
        return mean_BZ, log_variance_BZ

    def infer(self, x_BCHW: Tensor, epsilon_BZ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.decoder.infer(self.encoder(x_BCHW), epsilon_BZ)


def build(spec: VaeSpec, data: DataInfo) -> Vae:
    """A network for images of ``data.shape``."""
    if spec.network == "mlp":
        return Vae(spec, data, mlp_encoder(spec, data), mlp_decoder(spec, data))
    if spec.network == "conv":
        return Vae(spec, data, conv_encoder(spec, data), conv_decoder(spec, data))
    layout = (data.shape, num_halvings(data.shape), spec.base_channels)
    return Ladder(spec, data, BottomUp(*layout), TopDown(*layout, spec.latent_dim))


def latent_size(spec: VaeSpec, shape: tuple[int, ...]) -> int:
    """Z, for images of ``shape``."""
    if spec.network != "ladder":
        return spec.latent_dim
    return sum(prod(group) for group in group_shapes(shape, num_halvings(shape), spec.latent_dim))


def mean_image(likelihood: str, decoded_BCHW: Tensor) -> Tensor:
    """The mean of p(x|z) of its parameters, about [0, 1]."""
    return decoded_BCHW.sigmoid() if likelihood == "bernoulli" else decoded_BCHW


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
    variance = FINEST_VARIANCE + net.log_variance.exp()
    if spec.likelihood == "bernoulli":
        nats_BCHW = F.binary_cross_entropy_with_logits(decoded_BCHW, x_BCHW, reduction="none")
    elif spec.likelihood == "logistic":
        nats_BCHW = -log_of_grey_level(decoded_BCHW, x_BCHW, (3 * variance).sqrt() / pi)
    else:
        nats_BCHW = 0.5 * ((x_BCHW - decoded_BCHW) ** 2 / variance + (2 * pi * variance).log())
    return nats_BCHW.flatten(1).sum(1)


def log_of_grey_level(mean_BCHW: Tensor, x_BCHW: Tensor, scale: Tensor) -> Tensor:
    """Log of the probability of the grey level ``x``, one of 0, 1/255, ..., 1: of the logistic distribution's mass
    the part that is nearest to it, for the first and the last level the whole tail (Salimans et al., 2017,
    arXiv 1701.05517, equation 2)."""
    above_BCHW = (x_BCHW - mean_BCHW + HALF_A_LEVEL) / scale
    below_BCHW = (x_BCHW - mean_BCHW - HALF_A_LEVEL) / scale
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), whose factors have logarithms.
    last, first = x_BCHW > 1 - HALF_A_LEVEL, x_BCHW < HALF_A_LEVEL
    log_above_BCHW = torch.where(last, 0.0, F.logsigmoid(above_BCHW))
    log_below_BCHW = torch.where(first, 0.0, F.logsigmoid(-below_BCHW))
    width = (-torch.expm1(-2 * HALF_A_LEVEL / scale)).log()
    return log_above_BCHW + log_below_BCHW + torch.where(first | last, 0.0, width)


def bound(spec: VaeSpec, net: Vae, x_BCHW: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """``-log p(x|z)`` for one z of q(z|x), and the KL, in nats per image ``(B,)`` each (equation 10)."""
    epsilon_BZ = noise.normal(latent_size(spec, x_BCHW.shape[1:]))
    z_BZ, mean_BZ, log_variance_BZ = net.infer(x_BCHW, epsilon_BZ)
    return negative_log_likelihood(spec, net, net.decode(z_BZ), x_BCHW), kl_divergence(mean_BZ, log_variance_BZ)


def loss(spec: VaeSpec, net: Vae, batch: Batch, noise: Noise) -> Measured:
    """What ``spec.objective`` says."""
    x_BCHW = grey_levels(batch["image"])
    if spec.objective == "denoising":
        return denoising_loss(spec, net, x_BCHW, noise)
    nats_B, kl_B = bound(spec, net, x_BCHW, noise)
    reconstruction, kl = nats_B.mean(), kl_B.mean()
    values = {"elbo": -(reconstruction + kl), "reconstruction": reconstruction, "kl": kl}
    if spec.bounds_bytes:
        bits = 1 / (log(2) * prod(x_BCHW.shape[1:]))
        values |= {"kl_bits_per_dim": bits * kl, "bits_per_dim": bits * (reconstruction + kl)}
    return Measured(loss=reconstruction + spec.beta * kl, values=values)


def denoising_loss(spec: VaeSpec, net: Vae, x_BCHW: Tensor, noise: Noise) -> Measured:
    """``-log p(x|z)`` of the clean image, z being the code of a noisy one (Vincent et al., 2010)."""
    noisy_BCHW = x_BCHW + spec.corruption * noise.normal(*x_BCHW.shape[1:])
    code_BZ, _ = net.encode(noisy_BCHW)
    nats = negative_log_likelihood(spec, net, net.decode(code_BZ), x_BCHW).mean()
    return Measured(loss=nats, values={"reconstruction": nats})


# Scores ------------------------------------------------------------------------------------------


def elbo(spec: VaeSpec, net: Vae, batch: Batch, noise: Noise) -> Tensor:
    """A lower bound of log p(x) in nats per image ``(B,)``, from one latent (equation 10)."""
    nats_B, kl_B = bound(spec, net, grey_levels(batch["image"]), noise)
    return -(nats_B + kl_B)


def iwae(spec: VaeSpec, net: Vae, batch: Batch, noise: Noise, *, num_latents: int = 64) -> Tensor:
    """The tighter bound ``log mean p(x, z) / q(z|x)`` over latents, in nats per image (Burda et al., 2015)."""
    x_BCHW = grey_levels(batch["image"])
    log_weights: list[Tensor] = []
    for stream in range(num_latents):
        epsilon_BZ = noise.normal(latent_size(spec, x_BCHW.shape[1:]), stream=stream)
        z_BZ, _, log_variance_BZ = net.infer(x_BCHW, epsilon_BZ)
        # The two normal densities; their constants cancel.
        log_ratio_B = 0.5 * (epsilon_BZ**2 + log_variance_BZ - z_BZ**2).sum(1)
        log_weights.append(log_ratio_B - negative_log_likelihood(spec, net, net.decode(z_BZ), x_BCHW))
    return torch.stack(log_weights).logsumexp(0) - log(num_latents)


def bits_per_dim(spec: VaeSpec, net: Vae, batch: Batch, noise: Noise) -> Tensor:
    """``-elbo`` in bits per byte of an image ``(B,)``: what it costs at most, the likelihood being one of bytes."""
    return -elbo(spec, net, batch, noise) / (log(2) * prod(batch["image"].shape[1:]))


def kl_of_dimensions(spec: VaeSpec, net: Vae, batch: Batch, noise: Noise) -> Tensor:
    """KL(q(z|x) || N(0, 1)) of each latent dimension in nats, ``(B, Z)``; of a ladder's given those above it."""
    x_BCHW = grey_levels(batch["image"])
    _, mean_BZ, log_variance_BZ = net.infer(x_BCHW, noise.normal(latent_size(spec, x_BCHW.shape[1:])))
    return kl_by_dimension(mean_BZ, log_variance_BZ)


def posterior_mean(_spec: VaeSpec, net: Vae, batch: Batch, _noise: Noise) -> Tensor:
    """The mean of q(z|x), ``(B, Z)``."""
    return net.encode(grey_levels(batch["image"]))[0]


# Samplers ----------------------------------------------------------------------------------------


class Decode:
    """What the three samplers share: one step, in which latents ``z`` become images ``x``."""

    def __init__(self, spec: VaeSpec, data: DataInfo) -> None:
        self.spec, self.latent_size = spec, latent_size(spec, data.shape)

    def num_steps(self, request: object) -> int:
        return 1

    def step(self, net: Vae, state: SlotState, noise: Noise) -> SlotState:
        """Decode to the mean of p(x|z)."""
        return state | {"x": mean_image(self.spec.likelihood, net.decode(state["z"]))}

    def finish(self, net: Vae, state: SlotState) -> Tensor:
        return (state["x"].clamp(0, 1) * 255).round().to(torch.uint8)


class FromPrior(Decode):
    """Draws from N(0, temperature^2) and decodes."""

    def start(self, draws: Sequence[Draw[Generate]], noise: Noise) -> SlotState:
        temperature_S = torch.tensor([draw.request.temperature for draw in draws], device=noise.device)
        return {"z": temperature_S[:, None] * noise.normal(self.latent_size)}


class AlongPaths(Decode):
    """Decodes points between pairs of latents; the ends of pair ``p`` are the samples 2p and 2p + 1 of a seed."""

    def start(self, draws: Sequence[Draw[Interpolate]], noise: Noise) -> SlotState:
        pairs, points = zip(*(divmod(draw.index, draw.request.num_points) for draw in draws), strict=True)
        last_points = [draw.request.num_points - 1 for draw in draws]
        t_S = torch.tensor(points, device=noise.device) / torch.tensor(last_points, device=noise.device)
        a_SZ = noise.at([2 * pair for pair in pairs]).normal(self.latent_size)
        b_SZ = noise.at([2 * pair + 1 for pair in pairs]).normal(self.latent_size)
        return {"z": slerp(a_SZ, b_SZ, t_S[:, None])}


class AlongAxes(Decode):
    """Decodes zero with one latent at a time moved to several values."""

    def start(self, draws: Sequence[Draw[Traverse]], noise: Noise) -> SlotState:
        z_SZ = torch.zeros(len(draws), self.latent_size, device=noise.device)
        for z_Z, draw in zip(z_SZ, draws, strict=True):
            dimension, point = divmod(draw.index, draw.request.num_points)
            z_Z[dimension] = draw.request.reach * (2 * point / (draw.request.num_points - 1) - 1)
        return {"z": z_SZ}


class FromPosterior(Decode):
    """Encodes images to the mean of q(z|x) and decodes that."""

    def start(self, draws: Sequence[Draw[Encode | Reconstruct]], noise: Noise) -> SlotState:
        images = [draw.inputs["image"] for draw in draws if draw.inputs is not None]
        return {"image": torch.stack(images).to(noise.device)}

    def step(self, net: Vae, state: SlotState, noise: Noise) -> SlotState:
        """Both halves of the network at once."""
        mean_SZ, _ = net.encode(grey_levels(state["image"]))
        return super().step(net, state | {"z": mean_SZ}, noise)


class Latents(FromPosterior):
    """Encodes images to the mean of q(z|x), which is the sample."""

    def start(self, draws: Sequence[Draw[Encode | Reconstruct]], noise: Noise) -> SlotState:
        return super().start(draws, noise) | {"z": torch.zeros(len(draws), self.latent_size, device=noise.device)}

    def step(self, net: Vae, state: SlotState, noise: Noise) -> SlotState:
        return state | {"z": net.encode(grey_levels(state["image"]))[0]}

    def finish(self, net: Vae, state: SlotState) -> Tensor:
        """float32 ``(S, Z)``."""
        return state["z"]


FAMILY: Final = Family(
    spec=VaeSpec,
    build=build,
    losses={"vae": loss},
    tasks={
        "generate": FromPrior,
        "reconstruct": FromPosterior,
        "encode": Latents,
        "interpolate": AlongPaths,
        "traverse": AlongAxes,
    },
    scores={
        "elbo": Score(values=elbo),
        "iwae64": Score(values=iwae),
        "bits_per_dim": Score(values=bits_per_dim),
        "kl": Score(values=kl_of_dimensions, kind="dimensions"),
        "active_units": Score(values=posterior_mean, kind="variation"),
    },
)
