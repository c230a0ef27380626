"""Consistency tuning of a diffusion model (Geng et al., 2024, "ECT", arXiv 2406.14548): network, loss, sampler.

``D(x; sigma)`` of a diffusion model is the mean of all images that ``x`` may come from. Tuned to be equal along each
path from noise to image, and being the image itself at its end, it becomes that end: one evaluation is a sample.
Shape suffixes: B = batch, C = channels, H, W = height and width.
"""

from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from shared.errors import ModelLoadFailed
from shared.specs.consistency import MOST_STEPS, ConsistencySpec
from shared.specs.diffusion import DiffusionSpec
from worker.families.family import Batch, DataInfo, Family, Measured
from worker.families.nets.denoiser import Denoiser, centred, spread
from worker.families.nets.solvers import renoising
from worker.families.nets.solving import FIRST, LEVEL, FromNoise
from worker.kernels.noise import Noise

STEEPNESS: Final = 8.0
"""How much closer two noise levels are when they are low: k of equation 20."""
DEFAULT_STEPS: Final = 2


# Network -----------------------------------------------------------------------------------------


def origin_of(data: DataInfo) -> DiffusionSpec:
    """The spec of the diffusion model that is tuned."""
    return DiffusionSpec.model_validate(data.models["init_from"].spec)


def build(spec: ConsistencySpec, data: DataInfo) -> Denoiser:  # noqa: ARG001 - the signature of every family
    """The diffusion model's network.

    Raises:
        ModelLoadFailed: its denoiser of a clean image is not that image.
    """
    if origin_of(data).objective == "x0":
        raise ModelLoadFailed("a model of the objective x0 cannot be tuned: it does not end in its input")
    return data.models["init_from"].network()


# Loss --------------------------------------------------------------------------------------------


def nearer(spec: ConsistencySpec, sigma_B: Tensor, step: int) -> Tensor:
    """The lower of two noise levels that must agree (equation 20): zero at first, then ever closer to ``sigma``.

    ``r / sigma = 1 - n(sigma) / shrink^stage`` with ``n(sigma) = 1 + k sigmoid(-sigma)``.
    """
    apart_B = (1 + STEEPNESS * (-sigma_B).sigmoid()) / spec.shrink ** spec.stage_at(step)
    return sigma_B * (1 - apart_B).clamp(min=0)


def loss(spec: ConsistencySpec, net: Denoiser, batch: Batch, noise: Noise) -> Measured:
    """Distance between the estimates at two points of one path, the lower one held fixed (equation 8).

    Pseudo-Huber over each image, in units of the difference of the two levels (section 3).
    """
    x0_BCHW, step = centred(batch["image"]), noise.step
    sigma_B = (spec.noise_mean + spec.noise_std * noise.normal(stream=LEVEL).double()).exp()
    sigma_B = sigma_B.clamp(net.objective.sigma_min, net.objective.sigma_max)
    lower_B = nearer(spec, sigma_B, step)
    noise_BCHW = noise.normal(*x0_BCHW.shape[1:], stream=FIRST).double()
    label_B = batch["label"] if net.num_classes else torch.zeros_like(noise.index_B)
    dropped = noise if net.training else None
    with net.network.dropout.drawing(dropped):
        upper_BCHW = net(x0_BCHW + spread(sigma_B) * noise_BCHW, sigma_B, label_B)
    with torch.no_grad(), net.network.dropout.drawing(dropped):
        target_BCHW = net(x0_BCHW + spread(lower_B) * noise_BCHW, lower_B.clamp(min=net.objective.sigma_min), label_B)
        target_BCHW = torch.where(spread(lower_B) > 0, target_BCHW, x0_BCHW)
    error_B = (upper_BCHW - target_BCHW).square().flatten(1).mean(1)
    distance_B = (error_B + spec.huber**2).sqrt() - spec.huber if spec.huber else error_B
    weighted_B = distance_B / (sigma_B - lower_B)
    return Measured(loss=weighted_B.mean(), values={"disagreement": error_B.mean()})


# Sampler -----------------------------------------------------------------------------------------


class FewSteps(FromNoise):
    """Estimates the image; each further step adds noise to it and estimates again (2303.01469, algorithm 1)."""

    num_rows = MOST_STEPS

    def __init__(self, spec: ConsistencySpec, data: DataInfo) -> None:
        known = spec.num_classes(data.as_json())
        super().__init__(origin_of(data), replace(data, num_classes=known))
        self.second_level = spec.second_level

    def num_steps(self, request: Any) -> int:
        return request.steps or DEFAULT_STEPS

    def table(self, request: Any) -> Tensor:
        levels = [self.objective.sigma_max]
        levels += [self.second_level / 2**further for further in range(self.num_steps(request) - 1)]
        return renoising(torch.tensor([*levels, 0.0], dtype=torch.float64))


FAMILY: Final = Family(spec=ConsistencySpec, build=build, losses={"denoiser": loss}, tasks={"generate": FewSteps})
