"""A peer of ``bench/families.py``: denoising-diffusion-pytorch (lucidrains), its UNet, its losses and its sampler.

Its trainer wants a folder of pictures; what it does in a step is written down here: the loss, clipping at 1, Adam with
its betas, an average every ten steps. It imports torchvision for that folder's sake; where there is none, three names
stand for it that nothing here calls.

    pip install --no-deps denoising-diffusion-pytorch==2.3.4 ema-pytorch accelerate pytorch-fid einops scipy tqdm
"""

import sys
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn

from bench.timing import Step

DDPM: Final = "denoising-diffusion-pytorch"
MULTIPLES: Final = (1, 2, 4)
HEADS: Final = {"attn_dim_head": 32, "attn_heads": 4}


def _package() -> Any:
    with suppress(ImportError):
        import_module("torchvision")
    if "torchvision" not in sys.modules:
        parts = {name: ModuleType(f"torchvision.{name}") for name in ("transforms", "utils")}
        stand_in = ModuleType("torchvision")
        vars(stand_in).update(parts)
        sys.modules |= {"torchvision": stand_in} | {part.__name__: part for part in parts.values()}
    return import_module("denoising_diffusion_pytorch")


def num_parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def network(shape: tuple[int, ...], wanted: int) -> nn.Module:
    """Its UNet for images of ``shape`` with as nearly ``wanted`` parameters as a multiple of 8 channels gives."""
    package = _package()

    def of(channels: int) -> nn.Module:
        return package.Unet(dim=channels, dim_mults=MULTIPLES, channels=shape[0], flash_attn=True, **HEADS)

    with torch.device("meta"):
        sizes = {channels: num_parameters(of(channels)) for channels in range(16, 129, 8)}
    torch.manual_seed(0)
    return of(min(sizes, key=lambda channels: abs(sizes[channels] - wanted)))


def diffusion(net: nn.Module, size: int, *, steps: int) -> nn.Module:
    """Around it, drawing in so many steps of DDIM."""
    return _package().GaussianDiffusion(
        net, image_size=size, timesteps=1000, sampling_timesteps=steps, objective="pred_noise"
    )


def training(net: nn.Module, images: Tensor) -> Step:
    """A step on ``images`` (bytes)."""
    model = diffusion(net, images.shape[-1], steps=50).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.99))
    average = import_module("ema_pytorch").EMA(model, beta=0.995, update_every=10)

    def step() -> float:
        loss = model(images.float() / 255)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        return float(loss.detach())

    return step


def drawing(net: nn.Module, size: int, *, batch: int, steps: int) -> Step:
    """So many images at once."""
    model: Any = diffusion(net, size, steps=steps).eval()
    bar: Any = import_module(type(model).__module__)
    bar.tqdm = lambda steps, **_: steps  # nobody looks
    return lambda: model.sample(batch_size=batch)
