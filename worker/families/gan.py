"""Generative adversarial networks (Goodfellow et al., 2014, arXiv 1406.2661): networks, losses, samplers.

Objectives: non-saturating (the paper's), hinge (Miyato et al., 2018, arXiv 1802.05957), WGAN-GP (Gulrajani et al.,
2017, arXiv 1704.00028) and R3GAN (Huang et al., 2024, arXiv 2501.05441).

Shape suffixes: B = batch, S = slots, C = channels, H, W = height and width, X = the axes of a sample, Z = latent.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.specs.gan import GanSpec
from shared.specs.tasks import Generate, Interpolate
from worker.families.family import Batch, DataInfo, Draw, Family, Measured, SlotState
from worker.families.nets import dcgan, mlp_gan, r3gan, sngan
from worker.families.nets.batch_norm import Referenced
from worker.families.nets.diffaugment import NUM_DRAWS, augment
from worker.families.nets.slerp import slerp
from worker.families.nets.spectral import power_iterate, spectrally_normalised
from worker.kernels.noise import Noise

# Networks ----------------------------------------------------------------------------------------


class Gan(nn.Module):
    """Two networks: ``generator(z_BZ, label_B)`` gives samples, ``discriminator(x_BX, label_B)`` logits ``(B,)``."""

    def __init__(self, discriminator: nn.Module, generator: nn.Module) -> None:
        super().__init__()
        self.discriminator, self.generator = discriminator, generator


def classes_of(spec: GanSpec, data: DataInfo) -> int:
    """How many classes the networks know; zero for none."""
    return data.num_classes if spec.class_conditional else 0


def build_generator(spec: GanSpec, data: DataInfo) -> nn.Module:
    """Of the kind that ``spec.network`` names."""
    classes = {"latent_dim": spec.latent_dim, "num_classes": classes_of(spec, data)}
    match spec.network:
        case "mlp":
            return mlp_gan.Generator(data.shape, hidden_dim=spec.hidden_dim, **classes)
        case "dcgan":
            body = dcgan.Generator(data.shape, base_channels=spec.base_channels, **classes)
            return Referenced(body, **classes)
        case "sngan":
            sizes = {"base_channels": spec.base_channels, "num_blocks": spec.num_blocks}
            return Referenced(sngan.Generator(data.shape, **sizes, **classes), **classes)
        case "r3gan":
            sizes = {"base_channels": spec.base_channels, "num_blocks": spec.num_blocks}
            return r3gan.Generator(data.shape, finest_blocks=spec.finest_blocks, **sizes, **classes)


def build_discriminator(spec: GanSpec, data: DataInfo) -> nn.Module:
    """Of the kind that ``spec.network`` names, normalised as the objective needs it."""
    num_classes = classes_of(spec, data)
    sizes = {"num_classes": num_classes, "base_channels": spec.base_channels, "num_blocks": spec.num_blocks}
    match spec.network:
        case "mlp":
            net = mlp_gan.Discriminator(data.shape, num_classes=num_classes, hidden_dim=spec.hidden_dim)
        case "dcgan":
            batch_norm = spec.critic_norm == "batch"
            net = dcgan.Discriminator(
                data.shape, num_classes=num_classes, base_channels=spec.base_channels, batch_norm=batch_norm
            )
        case "sngan":
            net = sngan.Discriminator(data.shape, **sizes)
        case "r3gan":
            net = r3gan.Discriminator(data.shape, finest_blocks=spec.finest_blocks, **sizes)
    return spectrally_normalised(net) if spec.critic_norm == "spectral" else net


def build(spec: GanSpec, data: DataInfo) -> Gan:
    """Networks for samples of ``data.shape``."""
    return Gan(build_discriminator(spec, data), build_generator(spec, data))


# Losses ------------------------------------------------------------------------------------------


class Stream(IntEnum):
    """What a row draws in one step."""

    DISCRIMINATOR_LATENT = 0
    GENERATOR_LATENT = 1
    MIXTURE = 2
    DISCRIMINATOR_REAL = 3
    DISCRIMINATOR_FAKE = 4
    GENERATOR_REAL = 5
    GENERATOR_FAKE = 6


class Scores:
    """The discriminator's logits for real and fake samples of one batch, paired by their place in it."""

    def __init__(self, real_B: Tensor, fake_B: Tensor) -> None:
        self.real_B, self.fake_B = real_B, fake_B
        self.margin_B = real_B - fake_B


DISCRIMINATOR_LOSSES: Final[Mapping[str, Callable[[Scores], Tensor]]] = {
    "non_saturating": lambda scores: F.softplus(-scores.real_B) + F.softplus(scores.fake_B),
    "hinge": lambda scores: (1 - scores.real_B).relu() + (1 + scores.fake_B).relu(),
    "wgan_gp": lambda scores: -scores.margin_B,
    "r3gan": lambda scores: F.softplus(-scores.margin_B),
}
"""Goodfellow et al., section 3; Miyato et al., equation 16; Gulrajani et al., equation 3; Huang et al., equation 2."""

GENERATOR_LOSSES: Final[Mapping[str, Callable[[Scores], Tensor]]] = {
    "non_saturating": lambda scores: F.softplus(-scores.fake_B),
    "hinge": lambda scores: -scores.fake_B,
    "wgan_gp": lambda scores: -scores.fake_B,
    "r3gan": lambda scores: F.softplus(scores.margin_B),
}


@contextmanager
def differentiable_twice(device: torch.device) -> Iterator[None]:
    """Gradients also where they are measured only, and float32 whatever the autocast: they are differentiated again."""
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


def squared_slope(logits_B: Tensor, x_BX: Tensor) -> Tensor:
    """The squared norm of each logit's gradient by its own sample, shape ``(B,)``; R1 and R2 are means of it."""
    (slope_BX,) = torch.autograd.grad(logits_B.sum(), x_BX, create_graph=True)
    return slope_BX.square().flatten(1).sum(1)


def from_bytes(image_BCHW: Tensor) -> Tensor:
    """Bytes as float32 in [-1, 1]."""
    return image_BCHW.float() / 127.5 - 1


class Duel:
    """One batch before both networks: its real samples, and fake ones of the same classes at the same places."""

    def __init__(self, spec: GanSpec, net: Gan, real_BX: Tensor, label_B: Tensor | None, noise: Noise) -> None:
        self.spec, self.net, self.noise = spec, net, noise
        self.real_BX, self.label_B = real_BX, label_B
        self.step = noise.step

    def fakes(self, stream: Stream) -> Tensor:
        return self.net.generator(self.noise.normal(self.spec.latent_dim, stream=stream), self.label_B)

    def score(self, x_BX: Tensor, stream: Stream) -> Tensor:
        """Logits of augmented samples."""
        probability = self.spec.augment_at(self.step)
        if probability > 0:
            x_BX = augment(x_BX, self.noise.uniform(NUM_DRAWS, stream=stream), probability)
        return self.net.discriminator(x_BX, self.label_B)

    def discriminator_loss(self) -> Measured:
        with torch.no_grad():
            fake_BX = self.fakes(Stream.DISCRIMINATOR_LATENT)
        if not self.spec.pays_at(self.step):
            return self._unpenalised_loss(self.real_BX, fake_BX)[0]
        with differentiable_twice(fake_BX.device):
            return self._penalised_loss(self.real_BX.requires_grad_(), fake_BX.requires_grad_())

    def _unpenalised_loss(self, real_BX: Tensor, fake_BX: Tensor) -> tuple[Measured, Scores]:
        scores = Scores(self.score(real_BX, Stream.DISCRIMINATOR_REAL), self.score(fake_BX, Stream.DISCRIMINATOR_FAKE))
        loss = DISCRIMINATOR_LOSSES[self.spec.objective](scores).mean()
        values = {"real_logit": scores.real_B.mean(), "fake_logit": scores.fake_B.mean()}
        return Measured(loss=loss, values=values), scores

    def _penalised_loss(self, real_BX: Tensor, fake_BX: Tensor) -> Measured:
        measured, scores = self._unpenalised_loss(real_BX, fake_BX)
        if self.spec.objective == "r3gan":
            values = {
                "r1": squared_slope(scores.real_B, real_BX).mean(),
                "r2": squared_slope(scores.fake_B, fake_BX).mean(),
            }
            penalty = self.spec.gamma_at(self.step) / 2 * (values["r1"] + values["r2"])
        else:
            values = {"gradient_penalty": self._gradient_penalty(real_BX, fake_BX)}
            penalty = self.spec.gradient_penalty * values["gradient_penalty"]
        return Measured(loss=measured.loss + self.spec.penalty_every * penalty, values={**measured.values, **values})

    def _gradient_penalty(self, real_BX: Tensor, fake_BX: Tensor) -> Tensor:
        """How far the slope is from 1 between pairs of samples, squared (Gulrajani et al., equation 3)."""
        share_B = self.noise.uniform(stream=Stream.MIXTURE)
        share_BX = share_B.to(real_BX.dtype).view(-1, *[1] * (real_BX.ndim - 1))
        mixed_BX = torch.lerp(fake_BX, real_BX, share_BX).detach().requires_grad_()
        logits_B = self.net.discriminator(mixed_BX, self.label_B)
        # The root has no slope at zero, where a dead critic would be.
        norm_B = (squared_slope(logits_B, mixed_BX) + 1e-12).sqrt()
        return (norm_B - 1).square().mean()

    def generator_loss(self) -> Measured:
        fake_B = self.score(self.fakes(Stream.GENERATOR_LATENT), Stream.GENERATOR_FAKE)
        if self.spec.objective != "r3gan":
            return Measured(loss=GENERATOR_LOSSES[self.spec.objective](Scores(fake_B, fake_B)).mean(), values={})
        with torch.no_grad():
            real_B = self.score(self.real_BX, Stream.GENERATOR_REAL)
        return Measured(loss=GENERATOR_LOSSES["r3gan"](Scores(real_B, fake_B)).mean(), values={})


def discriminator_loss(spec: GanSpec, net: Gan, batch: Batch, noise: Noise) -> Measured:
    """What the discriminator descends on; the generator stands still."""
    if net.training:
        # Once a step, though a step that did not fit into memory comes in pieces.
        power_iterate(net.discriminator, noise.begins_step)
    return Duel(spec, net, from_bytes(batch["image"]), batch.get("label"), noise).discriminator_loss()


def generator_loss(spec: GanSpec, net: Gan, batch: Batch, noise: Noise) -> Measured:
    """What the generator descends on; the discriminator stands still."""
    return Duel(spec, net, from_bytes(batch["image"]), batch.get("label"), noise).generator_loss()


# Samplers ----------------------------------------------------------------------------------------


class FromLatent:
    """What both samplers share: one step, in which latents ``z`` of the classes ``label`` become images ``x``."""

    def __init__(self, spec: GanSpec, data: DataInfo) -> None:
        self.spec, self.num_classes = spec, classes_of(spec, data)

    def num_steps(self, request: object) -> int:
        return 1

    def labels(self, asked: Sequence[tuple[list[int] | None, int]], device: torch.device) -> Tensor:
        """The class of each ``index``, of those that were asked for or else of all, in turn."""
        known = list(range(max(1, self.num_classes)))
        chosen = [(labels or known)[index % len(labels or known)] for labels, index in asked]
        return torch.tensor(chosen, device=device)

    def step(self, net: Gan, state: SlotState, noise: Noise) -> SlotState:
        """Draw the images."""
        return state | {"x": net.generator(state["z"], state["label"])}

    def finish(self, net: Gan, state: SlotState) -> Tensor:
        return ((state["x"].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class FromPrior(FromLatent):
    """Draws latents from N(0, temperature^2)."""

    def start(self, draws: Sequence[Draw[Generate]], noise: Noise) -> SlotState:
        temperature_S = torch.tensor([draw.request.temperature for draw in draws], device=noise.device)
        z_SZ = temperature_S[:, None] * noise.normal(self.spec.latent_dim)
        return {"z": z_SZ, "label": self.labels([(draw.request.labels, draw.index) for draw in draws], noise.device)}


class AlongPaths(FromLatent):
    """Goes between pairs of latents of one class; the ends of pair ``p`` are the latents 2p and 2p + 1 of a seed."""

    def start(self, draws: Sequence[Draw[Interpolate]], noise: Noise) -> SlotState:
        pairs, points = zip(*(divmod(draw.index, draw.request.num_points) for draw in draws), strict=True)
        last_points = [draw.request.num_points - 1 for draw in draws]
        t_S = torch.tensor(points, device=noise.device) / torch.tensor(last_points, device=noise.device)
        a_SZ = noise.at([2 * pair for pair in pairs]).normal(self.spec.latent_dim)
        b_SZ = noise.at([2 * pair + 1 for pair in pairs]).normal(self.spec.latent_dim)
        asked = [(draw.request.labels, pair) for draw, pair in zip(draws, pairs, strict=True)]
        return {"z": slerp(a_SZ, b_SZ, t_S[:, None]), "label": self.labels(asked, noise.device)}


FAMILY: Final = Family(
    spec=GanSpec,
    build=build,
    losses={"discriminator": discriminator_loss, "generator": generator_loss},
    tasks={"generate": FromPrior, "interpolate": AlongPaths},
)
