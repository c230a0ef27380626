"""A family that Noisemill does not know: every pixel is normal, on its own. Read it as a package of somebody else's.

Shape suffixes: B = batch, S = slots, C, H, W = image.
"""

from collections.abc import Sequence
from math import log, pi

import torch
from torch import Tensor, nn

from shared.specs.tasks import Generate
from tests.plugin.pixel_gaussian_spec import PixelGaussianSpec
from worker.families.family import Batch, DataInfo, Draw, Family, Measured, Score, SlotState
from worker.kernels.noise import Noise


class Pixels(nn.Module):
    """A mean and the logarithm of a deviation for each pixel."""

    def __init__(self, shape: tuple[int, ...], least: float) -> None:
        super().__init__()
        self.least = least
        self.mean_CHW = nn.Parameter(torch.full(shape, 0.5))
        self.log_deviation_CHW = nn.Parameter(torch.full(shape, -1.0))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Log-density of each image ``(B,)``, in nats."""
        deviation_CHW = self.deviation()
        z_BCHW = (x_BCHW - self.mean_CHW) / deviation_CHW
        return -(0.5 * z_BCHW.square() + deviation_CHW.log() + 0.5 * log(2 * pi)).flatten(1).sum(1)

    def deviation(self) -> Tensor:
        return self.log_deviation_CHW.exp().clamp_min(self.least)


def build(spec: PixelGaussianSpec, data: DataInfo) -> Pixels:
    return Pixels(data.shape, spec.least_deviation)


def log_density(spec: PixelGaussianSpec, net: Pixels, batch: Batch, noise: Noise) -> Tensor:
    return net(batch["image"].float() / 255)


def loss(spec: PixelGaussianSpec, net: Pixels, batch: Batch, noise: Noise) -> Measured:
    mean = log_density(spec, net, batch, noise).mean()
    return Measured(loss=-mean, values={"log_density": mean})


class Sampler:
    """One step: the means, and each deviation times noise."""

    def __init__(self, spec: PixelGaussianSpec, data: DataInfo) -> None:
        self.shape = data.shape

    def num_steps(self, request: Generate) -> int:
        return 1

    def start(self, draws: Sequence[Draw[Generate]], noise: Noise) -> SlotState:
        temperature_S = torch.tensor([draw.request.temperature for draw in draws], device=noise.device)
        return {"x": noise.normal(*self.shape) * temperature_S.view(-1, 1, 1, 1)}

    def step(self, net: Pixels, state: SlotState, noise: Noise) -> SlotState:
        return {"x": net.mean_CHW + net.deviation() * state["x"]}

    def finish(self, net: Pixels, state: SlotState) -> Tensor:
        return (state["x"] * 255).round().clamp(0, 255).to(torch.uint8)


FAMILY = Family(
    spec=PixelGaussianSpec,
    build=build,
    losses={"density": loss},
    tasks={"generate": Sampler},
    scores={"log_density": Score(values=log_density)},
)
