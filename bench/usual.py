"""What the engine is measured against: the same work as usual scripts do it, and as one tunes them by hand.

As usual: float32, contiguous, eager, an optimizer and averages that launch a kernel for each tensor. These are the
defaults of diffusers' example for unconditional image generation, whose scheduler and pipeline are followed here in
our own words; where diffusers is installed its network is used, else ours, and the contestant's name says so. By hand:
bf16 autocast, channels-last, ``torch.compile``, the fused optimizer, averages of all tensors at once.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.timing import Step
from shared.specs.unet import UNETS
from worker.families.nets.diffusers_layout import config_of
from worker.families.nets.unet import UNet

DEFAULT, TUNED = "as usual", "tuned by hand"
NUM_TIMES: Final = 1000
EMA_WEIGHT: Final = 1e-4


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a script computes."""

    is_tuned: bool
    compiles: bool = False
    mode: str | None = None
    """Of ``torch.compile``."""

    def placed(self, net: nn.Module, device: torch.device) -> Any:
        net = net.to(device)
        if self.is_tuned:
            net = net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return torch.compile(net, mode=self.mode, dynamic=False) if self.compiles else net

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.is_tuned)

    def layout(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last) if self.is_tuned else images


USUAL: Final = Manner(is_tuned=False)


class Ours(nn.Module):
    """Our network as ``(x, time) -> noise``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t.float(), torch.zeros_like(t))


class Diffusers(nn.Module):
    """Diffusers' network as ``(x, time) -> noise``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t).sample


def has_diffusers() -> bool:
    return find_spec("diffusers") is not None


def predictor(preset: str, shape: tuple[int, ...]) -> tuple[str, nn.Module]:
    """A UNet of this layout, and whose it is."""
    net = UNet(UNETS[preset], shape[0])
    if not has_diffusers() or net.layout.patch_size > 1:
        return "our network", Ours(unzeroed(net))
    from diffusers.models.unets.unet_2d import UNet2DModel  # noqa: PLC0415 - may not be installed

    config = {name: value for name, value in config_of(net, shape).items() if not name.startswith("_")}
    return "diffusers", Diffusers(UNet2DModel(**config))


@torch.no_grad()
def unzeroed(net: Any) -> Any:
    """Fill what begins as zeros: products of zeros draw less power, and run faster, than those of a trained network."""
    for weight in net.parameters():
        if weight.ndim > 1 and not weight.any():
            weight.normal_(std=0.02)
    return net


def training(net: nn.Module, images: Tensor, manner: Manner) -> Step:
    """A step of the example: noise, mean square error, clipping, AdamW, averages."""
    device = images.device
    predict, x0 = manner.placed(net.train(), device), manner.layout(images)
    weights: list[Tensor] = list(net.parameters())
    averages = [weight.detach().clone() for weight in weights]
    fused = manner.is_tuned or None
    optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, fused=fused)
    shares = signal(device)

    def step() -> None:
        noise = torch.randn_like(x0)
        t = torch.randint(0, NUM_TIMES, (len(x0),), device=device)
        share = shares[t][:, None, None, None]
        noisy = share.sqrt() * x0 + (1 - share).sqrt() * noise
        with manner.autocast(device):
            predicted = predict(noisy, t)
        functional.mse_loss(predicted.float(), noise).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average(averages, weights, manner)

    return step


@torch.no_grad()
def average(averages: list[Tensor], weights: list[Tensor], manner: Manner) -> None:
    """Let the weights join their moving average."""
    if manner.is_tuned:
        torch._foreach_lerp_(averages, weights, EMA_WEIGHT)  # pyright: ignore[reportPrivateImportUsage]
        return
    for averaged, weight in zip(averages, weights, strict=True):
        averaged.sub_(EMA_WEIGHT * (averaged - weight))


def signal(device: torch.device) -> Tensor:
    """Share of the image in the variance at DDPM's times."""
    return (1 - torch.linspace(1e-4, 0.02, NUM_TIMES, device=device)).cumprod(0)


def ddim(net: nn.Module, shape: tuple[int, ...], steps: int, device: torch.device, manner: Manner) -> Step:
    """Draw a batch of ``shape`` ``(B, C, H, W)`` by DDIM, as a pipeline does: a loop over times in Python."""
    predict = manner.placed(net.eval(), device)
    shares = [*signal(torch.device("cpu")).tolist()]
    times = [step * (NUM_TIMES // steps) for step in reversed(range(steps))]

    @torch.no_grad()
    def draw() -> Tensor:
        x = manner.layout(torch.randn(shape, device=device))
        for here, there in zip(times, [*times[1:], None], strict=True):
            if manner.compiles:
                torch.compiler.cudagraph_mark_step_begin()
            with manner.autocast(device):
                noise = predict(x, torch.full((shape[0],), here, device=device)).float()
            now, then = shares[here], 1.0 if there is None else shares[there]
            x0 = (x - (1 - now) ** 0.5 * noise) / now**0.5
            x = then**0.5 * x0.clamp(-1, 1) + (1 - then) ** 0.5 * noise
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()

    return draw


# DCGAN -------------------------------------------------------------------------------------------


def _generator(num_channels: int, latent_dim: int, base: int) -> nn.Module:
    widths = [base * 8, base * 4, base * 2, base]
    layers: list[nn.Module] = [nn.ConvTranspose2d(latent_dim, widths[0], 4, bias=False)]
    for width, following in zip(widths, [*widths[1:], num_channels], strict=True):
        up = nn.ConvTranspose2d(width, following, 4, stride=2, padding=1, bias=False)
        layers += [nn.BatchNorm2d(width), nn.ReLU(), up]
    return nn.Sequential(*layers, nn.Tanh())


def _discriminator(num_channels: int, base: int) -> nn.Module:
    widths = [base, base * 2, base * 4, base * 8]
    layers: list[nn.Module] = []
    for before, width in zip([num_channels, *widths], widths, strict=False):
        norm = [nn.BatchNorm2d(width)] if layers else []
        layers += [nn.Conv2d(before, width, 4, stride=2, padding=1, bias=False), *norm, nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, bias=False), nn.Flatten(0))


def dcgan(images: Tensor, latent_dim: int, base: int) -> tuple[Step, int]:
    """A step of the tutorial's DCGAN (64 x 64 pixels) and its number of weights: eager, float32, Adam."""
    device = images.device
    nets = (_generator(images.shape[1], latent_dim, base), _discriminator(images.shape[1], base))
    generator, discriminator = (net.to(device).train() for net in nets)
    of_g, of_d = (torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in (generator, discriminator))
    ones, zeros = (make(len(images), device=device) for make in (torch.ones, torch.zeros))
    criterion = nn.BCEWithLogitsLoss()

    def step() -> None:
        fakes = generator(torch.randn(len(images), latent_dim, 1, 1, device=device))
        of_d.zero_grad()
        criterion(discriminator(images), ones).backward()
        criterion(discriminator(fakes.detach()), zeros).backward()
        of_d.step()
        of_g.zero_grad()
        criterion(discriminator(fakes), ones).backward()
        of_g.step()

    return step, sum(weight.numel() for net in (generator, discriminator) for weight in net.parameters())
