"""The limit of a piece of work: its operations over the measured matrix rate, its bytes over the measured copy rate.

The larger of both; no version of the work runs much faster. Operations are counted by torch as it runs the plain
network once, two for a multiplication with its addition. Bytes are the fewest: each convolution's and matrix product's
input and output once in 16 bits, a normalisation's likewise, and 38 of the optimizer for each weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.timing import Clock

PRODUCTS: Final = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
NORMS: Final = (nn.GroupNorm,)
OPTIMIZER_BYTES: Final = 38
NUM_BYTES: Final = 2
"""Of a number in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the device was seen to reach."""

    flops_per_second: float
    bytes_per_second: float
    """Read plus written."""

    @classmethod
    def measure(cls, clock: Clock, *, tiny: bool) -> "Ceilings":
        """By a large bf16 matrix product of random numbers and a large copy."""
        side, size = (256, 2**20) if tiny else (8192, 2**31)
        dtype = torch.float32 if clock.device.type == "cpu" else torch.bfloat16
        a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=clock.device)
        target = torch.empty_like(source)
        timings = clock.compete({"product": lambda: lambda: a @ b, "copy": lambda: lambda: target.copy_(source)})
        return cls(
            flops_per_second=2 * side**3 / timings["product"].median,
            bytes_per_second=2 * size / timings["copy"].median,
        )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What has to be done, at the least."""

    flops: float
    num_bytes: float

    def seconds(self, ceilings: Ceilings) -> float:
        """The limit."""
        return max(self.flops / ceilings.flops_per_second, self.num_bytes / ceilings.bytes_per_second)


@dataclass(frozen=True, kw_only=True)
class Count:
    """Of a network, for each sample."""

    forward_flops: float
    training_flops: float
    num_products: float
    """Numbers that go into and come out of convolutions and matrix products."""
    num_normalised: float
    """Numbers that go into normalisations."""
    num_parameters: int

    def forward(self, batch: int) -> Work:
        """One evaluation."""
        moved = (self.num_products + 2 * self.num_normalised) * batch + self.num_parameters
        return Work(flops=self.forward_flops * batch, num_bytes=NUM_BYTES * moved)

    def training(self, batch: int) -> Work:
        """One step: forward, backward by inputs and by weights, the optimizer."""
        moved = (3 * self.num_products + 5 * self.num_normalised) * batch
        optimizer = OPTIMIZER_BYTES * self.num_parameters
        return Work(flops=self.training_flops * batch, num_bytes=NUM_BYTES * moved + optimizer)


def count(net: nn.Module, forward: Callable[[], Tensor], rows: int) -> Count:
    """Run ``forward``, which evaluates ``net`` for so many samples, and the backward pass of what it gives."""
    seen = {"products": 0, "normalised": 0}

    def watch(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
        if isinstance(module, NORMS):
            seen["normalised"] += given[0].numel()
        else:
            seen["products"] += given[0].numel() + out.numel()

    hooks = [each.register_forward_hook(watch) for each in net.modules() if isinstance(each, (*PRODUCTS, *NORMS))]
    with FlopCounterMode(display=False) as forwards, torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    with FlopCounterMode(display=False) as both:
        forward().float().square().mean().backward()
    net.zero_grad()
    return Count(
        forward_flops=forwards.get_total_flops() / rows,
        training_flops=both.get_total_flops() / rows,
        num_products=seen["products"] / rows,
        num_normalised=seen["normalised"] / rows,
        num_parameters=sum(parameter.numel() for parameter in net.parameters()),
    )
