"""A diffusion model for diffusers: its UNet as a folder, and what its times and outputs mean there."""

from pathlib import Path
from typing import Final

from shared.specs.diffusion import DiffusionSpec
from worker.families.family import DataInfo
from worker.families.nets.denoiser import Denoiser
from worker.families.nets.diffusers_layout import write_folder
from worker.families.nets.latents import LatentDenoiser
from worker.families.nets.preconditioning import FIRST_BETA, FLOW_TIME, LAST_BETA, NUM_TIMES
from worker.families.nets.unet import UNet

OUTPUTS: Final = {"eps": "the noise `n`", "v": "the velocity `a n - s x0`", "x0": "the image `x0`"}
PREDICTIONS: Final = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
"""What diffusers' schedulers call them."""
STEPS: Final = 50


def to_diffusers(folder: Path, spec: DiffusionSpec, net: Denoiser, data: DataInfo) -> str:
    """Write what ``UNet2DModel.from_pretrained`` reads, and say how it is used.

    Raises:
        ValueError: the model is not one that ``DiffusionSpec.check_export`` lets through.
    """
    if isinstance(net, LatentDenoiser) or not isinstance(net.network, UNet):
        raise ValueError("UNet2DModel is a UNet of images: this network cannot be exported")
    write_folder(folder, net.network, data.shape)
    classes = [_classes(net.num_classes)] if net.num_classes else []
    return "\n\n".join([_meaning(spec), *classes, _sampling(spec, net.num_classes, data.shape)])


def _meaning(spec: DiffusionSpec) -> str:
    """What goes in and what comes out."""
    images = "Images `x0` are in [-1, 1], noise `n` is standard normal"
    if spec.objective == "flow":
        return (
            f"{images}. The network is told `(1 - t) x0 + t n` and the time `{FLOW_TIME:.0f} t`, 0 < t ≤ 1, and "
            "returns the direction `n - x0` (rectified flow)."
        )
    return (
        f"{images}. The network is told `a x0 + s n` and DDPM's time, 0 to {NUM_TIMES - 1}, and returns "
        f"{OUTPUTS[spec.objective]}. `a²` is the product of `1 - beta` up to that time, `s² = 1 - a²`, and beta rises "
        f"linearly from {FIRST_BETA} to {LAST_BETA}."
    )


def _classes(num_classes: int) -> str:
    return f"`class_labels` are 0 to {num_classes - 1}, in the dataset's order; {num_classes} stands for no class."


def _sampling(spec: DiffusionSpec, num_classes: int, shape: tuple[int, ...]) -> str:
    """A program that draws images in the folder."""
    if spec.objective == "flow":
        scheduler, made = "FlowMatchEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler()"
    else:
        scheduler = "DDIMScheduler"
        betas = f'beta_start={FIRST_BETA}, beta_end={LAST_BETA}, beta_schedule="linear"'
        made = f'DDIMScheduler({betas}, prediction_type="{PREDICTIONS[spec.objective]}")'
    told = ", class_labels=labels" if num_classes else ""
    labels = [f"labels = torch.arange(4) % {num_classes}"] if num_classes else []
    lines = [
        "import torch",
        f"from diffusers import {scheduler}, UNet2DModel",
        "",
        'unet = UNet2DModel.from_pretrained(".")',
        f"scheduler = {made}",
        f"scheduler.set_timesteps({STEPS})",
        *labels,
        f"x = torch.randn(4, {', '.join(str(size) for size in shape)})",
        "for t in scheduler.timesteps:",
        "    with torch.no_grad():",
        f"        output = unet(x, t{told}).sample",
        "    x = scheduler.step(output, t, x).prev_sample",
        "images = (x.clamp(-1, 1) + 1) / 2  # in [0, 1]",
    ]
    return "\n".join(["```python", *lines, "```"])
