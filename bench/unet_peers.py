"""diffusers' UNet as its users run it: as its training script sets it up, and tuned by hand."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to run it. What is tuned has a fused optimizer, and an average that takes all tensors at once."""

    name: str
    tuned: bool = True
    channels_last: bool = False
    autocast: bool = False
    pure: bool = False
    """Weights, too, are bfloat16: no float32 copy of them is kept, so small updates are lost."""
    compiled: bool = False

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=32, block_out_channels=(64, 128, 128), layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            downsample_padding=0, norm_eps=1e-6, flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None,
        )  # fmt: skip
        net = cast("nn.Module", unet)
        if self.pure:
            net = net.to(torch.bfloat16)
        return net.to(memory_format=torch.channels_last) if self.channels_last else net  # pyright: ignore[reportCallIssue]

    def ready(self, net: nn.Module) -> Callable[..., Any]:
        return torch.compile(net) if self.compiled else net

    def place(self, x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16) if self.pure else x
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def context(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()


PEERS: Final = (
    Peer(name="diffusers", tuned=False),
    Peer(name="diffusers fused", tuned=True),
    Peer(name="diffusers channels_last", channels_last=True),
    Peer(name="diffusers bf16", autocast=True),
    Peer(name="diffusers bf16 channels_last", autocast=True, channels_last=True),
    Peer(name="diffusers pure bf16", pure=True),
    Peer(name="diffusers pure bf16 channels_last", pure=True, channels_last=True),
    Peer(name="diffusers compiled", compiled=True),
    Peer(name="diffusers bf16 compiled", autocast=True, compiled=True),
    Peer(name="diffusers bf16 channels_last compiled", autocast=True, channels_last=True, compiled=True),
    Peer(name="diffusers pure bf16 channels_last compiled", pure=True, channels_last=True, compiled=True),
)


class PeerTraining:
    """The loop of diffusers' ``train_unconditional.py``: noise, predict it, clip, AdamW, average."""

    def __init__(self, peer: Peer, images: Tensor) -> None:
        self.peer, self.images = peer, images
        self.net = peer.network().train()
        self.forward = peer.ready(self.net)
        self.parameters = list(self.net.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True if peer.tuned else None)
        self.average = EMAModel(self.parameters, decay=0.9999, foreach=peer.tuned)
        self.scheduler = DDPMScheduler(num_train_timesteps=1000)

    def step(self) -> float:
        clean = self.images.float() / 127.5 - 1
        noise = torch.randn(clean.shape)
        t = torch.randint(0, 1000, (len(clean),))
        noisy = self.peer.place(self.scheduler.add_noise(clean, noise, t))  # pyright: ignore[reportArgumentType]
        with self.peer.context():
            predicted = self.forward(noisy, t).sample
        loss = nn.functional.mse_loss(predicted.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.parameters)
        return loss.item()


class PeerSampler:
    """What ``DDIMPipeline`` does, without its progress bar."""

    def __init__(self, peer: Peer, num: int, steps: int) -> None:
        self.peer, self.num, self.steps = peer, num, steps
        net = peer.network().eval().requires_grad_(requires_grad=False)
        self.forward = peer.ready(net)

    @torch.no_grad()
    def draw(self) -> Tensor:
        scheduler = DDIMScheduler(num_train_timesteps=1000)
        scheduler.set_timesteps(self.steps)
        x = torch.randn(self.num, 3, 32, 32)
        for t in scheduler.timesteps:
            with self.peer.context():
                predicted = self.forward(self.peer.place(x), t).sample
            x = scheduler.step(predicted.float(), t, x).prev_sample  # pyright: ignore
        return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
