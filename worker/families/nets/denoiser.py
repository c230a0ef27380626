"""A diffusion model's network as a denoiser, whatever it predicts (Karras et al., 2022, "EDM", arXiv 2206.00364).

Equation numbers are of that paper. Shape suffixes: B = batch, C = channels, H, W = height and width.
"""

from typing import Final

import torch
from torch import Tensor, nn

from shared.specs.diffusion import DiffusionSpec
from worker.families.family import DataInfo
from worker.families.nets.dit import DiT
from worker.families.nets.preconditioning import Edm, Flow, VariancePreserving
from worker.families.nets.unet import UNet

Network = UNet | DiT
AnyObjective = Edm | Flow | VariancePreserving


class Denoiser(nn.Module):
    """D(x; sigma): the best guess of the clean image inside a noisy one (equation 7); of pixels in [-1, 1]."""

    is_called_whole: Final = True

    def __init__(self, network: Network, objective: AnyObjective, num_classes: int) -> None:
        super().__init__()
        self.network, self.objective, self.num_classes = network, objective, num_classes

    def forward(self, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
        """The clean image, float64 as ``x`` and ``sigma`` are; class ``num_classes`` stands for none."""
        scales = self.objective.scales(sigma_B)
        raw_BCHW = self.raw(x_BCHW, sigma_B, label_B)
        return spread(scales.c_skip) * x_BCHW + spread(scales.c_out) * raw_BCHW

    def raw(self, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor) -> Tensor:
        """F of equation 7, in float32."""
        scales = self.objective.scales(sigma_B)
        return self.network((spread(scales.c_in) * x_BCHW).float(), scales.c_noise.float(), label_B)

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """What is denoised of images, which are bytes: float64."""
        return centred(image_BCHW)

    def decode(self, x_BCHW: Tensor) -> Tensor:
        """The bytes again."""
        return to_bytes(x_BCHW)


def spread(values_B: Tensor) -> Tensor:
    """A number per image as ``(B, 1, 1, 1)``."""
    return values_B[:, None, None, None]


def objective_of(spec: DiffusionSpec) -> AnyObjective:
    """What the network predicts."""
    given = {"mean": spec.noise_mean, "std": spec.noise_std}
    levels = {name: value for name, value in given.items() if value is not None}
    match spec.objective:
        case "edm":
            return Edm(spec.sigma_data, **levels)
        case "flow":
            return Flow(**levels)
        case prediction:
            return VariancePreserving(prediction, spec.process)


def num_classes_of(spec: DiffusionSpec, data: DataInfo) -> int:
    """Classes that the network knows."""
    return data.num_classes if spec.class_conditional else 0


def centred(image_BCHW: Tensor) -> Tensor:
    """Bytes as float64 in [-1, 1]."""
    return image_BCHW.double() / 127.5 - 1


def to_bytes(x_BCHW: Tensor) -> Tensor:
    """The nearest bytes."""
    return ((x_BCHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
