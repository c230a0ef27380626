"""The quality case of 25 Gaussians on a grid: does R3GAN find every mode, with the losses and the engine of images?

A sample is a point in the plane. The critic and the generator are the family's MLPs, the losses its own; only the data
are numbers instead of bytes. A sample is of high quality if it lies within three standard deviations of a mode, and a
mode is found if it has one hundredth of its share of them at least.
"""

from typing import Any, Final

import torch
from torch import Tensor

from bench.digits import Digits
from bench.quality_parts import Judge, Measures, Trained, advanced
from shared.specs import GanSpec
from shared.specs.training import TrainSpec
from worker.engine.training import Trainer
from worker.families.family import Batch, DataInfo, Family, Measured
from worker.families.gan import Duel, Gan, build
from worker.kernels.noise import Domain, Noise

CPU: Final = torch.device("cpu")
PLANE: Final = DataInfo(shape=(2,))
SIDE: Final = 5
"""Modes along each axis, at -4, -2, 0, 2 and 4."""
EDGE: Final = 5.0
"""What is looked at, and drawn, reaches so far from the origin along each axis."""
DEVIATION: Final = 0.05
"""Of each mode, as in PacGAN (Lin et al., 2018, arXiv 1712.04086): a fortieth of their distance."""
FOUND: Final = 0.01
"""Share of a mode, of what would be even, from which on it counts as found."""
NUM_JUDGED: Final = 10_000
AT_ONCE: Final = 100
"""Batches that are drawn together, which takes a tenth of the time that drawing one by one takes."""
PIXELS: Final = 400
"""Along each edge of the picture of the samples."""


def modes() -> Tensor:
    """Centres, ``(25, 2)``."""
    axis = torch.linspace(-4, 4, SIDE)
    return torch.cartesian_prod(axis, axis)


def points(domain: Domain, seed: int, step: int, num_points: int) -> Tensor:
    """A batch of the mixture, ``(B, 2)``."""
    noise = Noise.of_step(domain, seed, step, range(num_points), CPU)
    mode = (noise.uniform(stream=100) * SIDE**2).long()
    return modes()[mode] + DEVIATION * noise.normal(2, stream=101)


def discriminator_loss(spec: GanSpec, net: Gan, batch: Batch, noise: Noise) -> Measured:
    return Duel(spec, net, batch["point"], None, noise).discriminator_loss()


def generator_loss(spec: GanSpec, net: Gan, batch: Batch, noise: Noise) -> Measured:
    return Duel(spec, net, batch["point"], None, noise).generator_loss()


FAMILY: Final = Family(
    spec=GanSpec,
    build=build,
    losses={"discriminator": discriminator_loss, "generator": generator_loss},
    tasks={},
)


def on_the_plane(spec: TrainSpec, digits: Digits, _device: torch.device) -> Trained:
    """Train on points that are new in each step, on the CPU; ``digits`` are those of other cases."""
    trainer: Trainer[Any, Any] = Trainer(FAMILY, spec, PLANE, CPU)
    drawn: list[Tensor] = []

    def batch_at(step: int) -> Batch:
        place = step % AT_ONCE
        if place == 0:
            drawn[:] = points(Domain.TRAINING, spec.seed, step, AT_ONCE * spec.batch_size).split(spec.batch_size)
        return {"point": drawn[place]}

    return advanced(trainer, digits, batch_at)


def quality(samples: Tensor) -> Measures:
    """How many modes are found, and the share of samples of high quality."""
    distance, nearest = torch.cdist(samples, modes()).min(1)
    good = distance < 3 * DEVIATION
    counts = nearest[good].bincount(minlength=SIDE**2)
    found = int((counts >= FOUND * len(samples) / SIDE**2).sum())
    share = counts / counts.sum().clamp(min=1)
    divergence = torch.special.xlogy(share, share * SIDE**2).sum().item()
    return {"modes": found, "high_quality": good.float().mean().item(), "kl_of_modes": divergence}


def gaussians_figures(trained: Trained, _judge: Judge) -> Measures:
    """Of the averaged generator; beside them those of the mixture itself, and of a uniform square."""
    spec = trained.trainer.spec
    noise = Noise.of_step(Domain.SAMPLING, spec.seed, 0, range(NUM_JUDGED), CPU)
    with torch.no_grad():
        drawn = trained.trainer.average.generator(noise.normal(spec.latent_dim), None)
    real = points(Domain.EVALUATION, spec.seed, 0, NUM_JUDGED)
    trained.samples |= {"samples": picture(drawn), "mixture": picture(real)}
    beside = {"mixture": real, "square": 2 * EDGE * noise.uniform(2, stream=102) - EDGE}
    return {
        **quality(drawn),
        **{f"{name}_{figure}": value for name, one in beside.items() for figure, value in quality(one).items()},
    }


def picture(samples: Tensor) -> Tensor:
    """Where points lie, the brighter the more there are, uint8 ``(1, 1, PIXELS, PIXELS)``."""
    cell = ((samples + EDGE) * (PIXELS / (2 * EDGE))).long()
    inside = cell[((cell >= 0) & (cell < PIXELS)).all(1)]
    counts = (inside[:, 1] * PIXELS + inside[:, 0]).bincount(minlength=PIXELS**2).view(1, 1, PIXELS, PIXELS)
    return (counts * 64).clamp(max=255).byte()
