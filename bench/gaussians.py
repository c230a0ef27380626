"""25 Gaussians on a grid: does R3GAN find every mode, with the losses and the engine that train on images?

A sample is a point in the plane. The critic and the generator are the family's MLPs, the losses its own; only the data
are numbers instead of bytes. A sample is of high quality if it lies within three standard deviations of a mode, and a
mode is found if it has one hundredth of its share of them at least. Prints JSON.

    python -m bench.gaussians [--steps 30000] [--seed 0]
"""

import argparse
import json
import platform
import time
from typing import Any, Final

import torch
from torch import Tensor

from shared.specs import GanSpec
from worker.engine.training import Trainer
from worker.families.family import Batch, DataInfo, Family, Measured
from worker.families.gan import Duel, Gan, build
from worker.kernels.noise import Domain, Noise

CPU: Final = torch.device("cpu")
PLANE: Final = DataInfo(shape=(2,))
SIDE: Final = 5
"""Modes along each axis, at -4, -2, 0, 2 and 4."""
DEVIATION: Final = 0.05
"""Of each mode, as in PacGAN (Lin et al., 2018, arXiv 1712.04086): a fortieth of their distance."""
FOUND: Final = 0.01
"""Share of a mode, of what would be even, from which on it counts as found."""
NUM_JUDGED: Final = 10_000


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


def quality(samples: Tensor) -> dict[str, float]:
    """How many modes are found, and the share of samples of high quality."""
    distance, nearest = torch.cdist(samples, modes()).min(1)
    good = distance < 3 * DEVIATION
    counts = nearest[good].bincount(minlength=SIDE**2)
    found = int((counts >= FOUND * len(samples) / SIDE**2).sum())
    share = counts / counts.sum().clamp(min=1)
    divergence = torch.special.xlogy(share, share * SIDE**2).sum().item()
    return {"modes": found, "high_quality": good.float().mean().item(), "kl_of_modes": divergence}


def run(spec: GanSpec) -> dict[str, Any]:
    """Train, and judge the averaged generator; the mixture itself and a uniform square are judged beside it."""
    trainer = Trainer(FAMILY, spec, PLANE, CPU)
    began = time.perf_counter()
    for step in range(spec.steps):
        trainer.advance({"point": points(Domain.TRAINING, spec.seed, step, spec.batch_size)})
    seconds = time.perf_counter() - began
    noise = Noise.of_step(Domain.SAMPLING, spec.seed, 0, range(NUM_JUDGED), CPU)
    with torch.no_grad():
        drawn = trainer.average.generator(noise.normal(spec.latent_dim), None)
    return {
        "train_seconds": round(seconds, 1),
        "ms_per_step": round(1000 * seconds / spec.steps, 2),
        "r3gan": quality(drawn),
        "real": quality(points(Domain.EVALUATION, spec.seed, 0, NUM_JUDGED)),
        "uniform": quality(10 * noise.uniform(2, stream=102) - 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    spec = GanSpec(
        family="gan", dataset="ds_" + "0" * 32, model="gaussians", network="mlp", precision="fp32",
        steps=options.steps, seed=options.seed, batch_size=128, latent_dim=2, hidden_dim=256, learning_rate=4e-4,
        gamma=1.0, gamma_end=0.001, penalty_every=4, ema_decay=0.998,
    )  # fmt: skip
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    print(
        json.dumps({"machine": machine, "torch": torch.__version__, "spec": spec.model_dump(mode="json"), **run(spec)})
    )


if __name__ == "__main__":
    main()
