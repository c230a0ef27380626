"""Images with something in common and something of their own, from keyed noise."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from worker.kernels.noise import Domain, Noise


def noise(num: int, seed: int = 0) -> Noise:
    return Noise.of_step(Domain.EVALUATION, seed, 7, range(num), torch.device("cpu"))


def vectors(num: int, dim: int, *, seed: int = 0) -> Tensor:
    """Normal vectors, float64: correlated, with means and deviations of their own."""
    mixing = Noise.of_step(Domain.EVALUATION, 99, 0, range(dim), torch.device("cpu")).normal(dim).double()
    return noise(num, seed).normal(dim).double() @ mixing / dim**0.5 + torch.linspace(-1, 1, dim).double()


def strokes(num: int, *, seed: int = 0, size: int = 28) -> Tensor:
    """Grey images of one blurred bar each, at a random place and angle: uint8 ``(num, 1, size, size)``."""
    angle, shift, bright = noise(num, seed).uniform(3).unbind(1)
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    theta = (angle * torch.pi)[:, None, None]
    across = x * theta.cos() + y * theta.sin() - (shift[:, None, None] - 0.5)
    image = (-((across / 0.15) ** 2)).exp() * (0.5 + bright[:, None, None] / 2)
    return (image * 255).round().to(torch.uint8)[:, None]


def weights_of(build: Callable[[], nn.Module], **classifier: Tensor) -> dict[str, Tensor]:
    """A network's, each layer of which keeps its input's scale, and the classifier that published files hold."""
    with torch.device("meta"):
        own = build().state_dict()
    generator = torch.Generator().manual_seed(0)
    tensors = dict(classifier)
    for name, tensor in own.items():
        if tensor.ndim == 4:
            scale = (2 / tensor[0].numel()) ** 0.5
            tensors[name] = scale * torch.randn(tensor.shape, generator=generator)
        elif not name.endswith("num_batches_tracked"):
            tensors[name] = torch.zeros(tensor.shape) if name.endswith(("bias", "mean")) else torch.ones(tensor.shape)
    return tensors
