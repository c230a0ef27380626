"""A diffusion model for diffusers: its UNet and a scheduler as a folder, which is a pipeline's, too, where the library
has one that draws from it, and what its times and outputs mean there."""

from pathlib import Path
from typing import Any, Final

from shared.specs import diffusers_scheduler
from shared.specs.diffusers_folder import INDEX, SCHEDULER
from shared.specs.diffusers_unet import CLASS_NAME, TOLD
from shared.specs.diffusion import DiffusionSpec
from shared.specs.noising import DDPM, EDM_TIME, FLOW_TIME, Process
from worker.families.family import DataInfo
from worker.families.nets.denoiser import Denoiser
from worker.families.nets.diffusers_layout import write_folder, write_json
from worker.families.nets.latents import LatentDenoiser
from worker.families.nets.unet import UNet

OUTPUTS: Final = {"eps": "the noise `n`", "v": "the velocity `a n - s x0`", "x0": "the image `x0`"}
STEPS: Final = 50
PIPELINES: Final = {
    "DDIMScheduler": "DDIMPipeline",
    "DDPMScheduler": "DDPMPipeline",
    "FlowMatchEulerDiscreteScheduler": "DDPMPipeline",
}
"""The pipelines that draw from a ``UNet2DModel`` without classes with such a scheduler; of EDM's none scales the
input."""
CLIPPED_ABOVE: Final = 1000.0
"""The noise level from which an estimate ``x0 = x - sigma n`` is so far out that the pipeline has to clip it."""


def to_diffusers(folder: Path, spec: DiffusionSpec, net: Denoiser, data: DataInfo) -> str:
    """Write what ``UNet2DModel.from_pretrained`` and a scheduler's read, and say how they are used.

    Raises:
        ValueError: the model is not one that ``DiffusionSpec.check_export`` lets through.
    """
    if isinstance(net, LatentDenoiser) or not isinstance(net.network, UNet):
        raise ValueError("UNet2DModel is a UNet of images: this network cannot be exported")
    write_folder(folder, net.network, data.shape, {TOLD: _told(spec, net)})
    scheduler = _scheduler(spec, net)
    write_json(folder / SCHEDULER, scheduler)
    name = scheduler["_class_name"]
    pipeline = None if net.num_classes else PIPELINES.get(name)
    if pipeline is not None:
        write_json(folder / INDEX, _index(pipeline, name))
    classes = [_classes(net.num_classes)] if net.num_classes else []
    usage = _sampling(spec, name, net.num_classes, data.shape)
    drawn = [] if pipeline is None else [_drawing(pipeline)]
    return "\n\n".join([_meaning(spec), *classes, usage, *drawn])


def _scheduler(spec: DiffusionSpec, net: Denoiser) -> dict[str, Any]:
    """The configuration of one that draws from the network."""
    config = diffusers_scheduler.config_of(spec.objective, spec.sigma_data, spec.process)
    if spec.objective == "eps" and net.objective.sigma_max > CLIPPED_ABOVE:
        config["clip_sample"] = True
    return config


def _index(pipeline: str, scheduler: str) -> dict[str, Any]:
    """Which classes the folder is of: whose files lie beside it, as those of the first pipelines did."""
    return {"_class_name": pipeline, "scheduler": ["diffusers", scheduler], "unet": ["diffusers", CLASS_NAME]}


def _drawing(pipeline: str) -> str:
    return f'The folder is a `{pipeline}`, too: `{pipeline}.from_pretrained(".")(batch_size=4)` draws images.'


def _told(spec: DiffusionSpec, net: Denoiser) -> dict[str, Any]:
    """What an import reads again (``shared.specs.diffusers_unet.Told``)."""
    edm = {"sigma_data": spec.sigma_data, "time_scale": EDM_TIME} if spec.objective == "edm" else {}
    betas = {"process": spec.process.told()} if spec.process != DDPM else {}
    return {"objective": spec.objective, "num_classes": net.num_classes, **edm, **betas}


def _meaning(spec: DiffusionSpec) -> str:
    """What goes in and what comes out."""
    images = "Images `x0` are in [-1, 1], noise `n` is standard normal"
    match spec.objective:
        case "edm":
            return (
                f"{images}. Of `x = x0 + sigma n` the network is told `c_in x` and the time "
                f"`{EDM_TIME:.0f} ln(sigma) / 4`, which is {EDM_TIME:.0f} times what diffusers' EDM schedulers call a "
                "timestep, and returns `F`: the image is `c_skip x + c_out F` (Karras et al., 2022, table 1, with "
                f"`sigma_data` {spec.sigma_data})."
            )
        case "flow":
            return (
                f"{images}. The network is told `(1 - t) x0 + t n` and the time `{FLOW_TIME:.0f} t`, 0 < t ≤ 1, and "
                "returns the direction `n - x0` (rectified flow)."
            )
        case prediction:
            return (
                f"{images}. The network is told `a x0 + s n` and DDPM's time, 0 to "
                f"{spec.process.num_train_timesteps - 1}, and returns {OUTPUTS[prediction]}. `a²` is the product of "
                f"`1 - beta` up to that time, `s² = 1 - a²`, and beta {_betas(spec.process)}."
            )


def _betas(process: Process) -> str:
    """How they go."""
    if process.trained_betas is not None:
        return f"is each of `trained_betas` in `{SCHEDULER}`"
    match process.beta_schedule:
        case "linear":
            return f"rises linearly from {process.beta_start} to {process.beta_end}"
        case "squaredcos_cap_v2":
            return "is the library's `squaredcos_cap_v2`"
        case name:
            return f"rises from {process.beta_start} to {process.beta_end} as the library's `{name}`"


def _classes(num_classes: int) -> str:
    return f"`class_labels` are 0 to {num_classes - 1}, in the dataset's order; {num_classes} stands for no class."


def _sampling(spec: DiffusionSpec, scheduler: str, num_classes: int, shape: tuple[int, ...]) -> str:
    """A program that draws images in the folder."""
    is_edm = spec.objective == "edm"
    noise = f"torch.randn(4, {', '.join(str(size) for size in shape)})"
    seen, time = ("scheduler.scale_model_input(x, t)", f"{EDM_TIME:.0f} * t") if is_edm else ("x", "t")
    labels = [f"labels = torch.arange(4) % {num_classes}"] if num_classes else []
    lines = [
        "import torch",
        f"from diffusers import {scheduler}, UNet2DModel",
        "",
        'unet = UNet2DModel.from_pretrained(".")',
        f'scheduler = {scheduler}.from_pretrained(".")',
        f"scheduler.set_timesteps({STEPS})",
        *labels,
        f"x = {noise} * scheduler.init_noise_sigma" if is_edm else f"x = {noise}",
        "for t in scheduler.timesteps:",
        "    with torch.no_grad():",
        f"        output = unet({seen}, {time}{', class_labels=labels' if num_classes else ''}).sample",
        "    x = scheduler.step(output, t, x).prev_sample",
        "images = (x.clamp(-1, 1) + 1) / 2  # in [0, 1]",
    ]
    return "\n".join(["```python", *lines, "```"])
