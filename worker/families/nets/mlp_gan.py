"""A fully connected generator and discriminator (Goodfellow et al., 2014, arXiv 1406.2661).

Shape suffixes: B = batch, X = the axes of a sample, Z = latent.
"""

import torch
from torch import Tensor, nn

from worker.families.nets.conditioning import LabelledLatent, ProjectionHead

NUM_LAYERS = 3
"""Hidden layers of each network."""


def hidden_layers(num_features: int, hidden_dim: int) -> nn.Sequential:
    """Linear layers with leaky rectifiers."""
    layers: list[nn.Module] = []
    for num_in in (num_features, *[hidden_dim] * (NUM_LAYERS - 1)):
        layers += [nn.Linear(num_in, hidden_dim), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


class Generator(nn.Module):
    """A latent to a sample of any shape, unbounded."""

    def __init__(self, shape: tuple[int, ...], *, latent_dim: int, num_classes: int, hidden_dim: int) -> None:
        super().__init__()
        self.latent = LabelledLatent(latent_dim, num_classes)
        self.body = hidden_layers(self.latent.num_features, hidden_dim)
        self.out = nn.Linear(hidden_dim, torch.Size(shape).numel())
        self.shape = shape

    def forward(self, z_BZ: Tensor, label_B: Tensor | None) -> Tensor:
        return self.out(self.body(self.latent(z_BZ, label_B))).unflatten(1, self.shape).float()


class Discriminator(nn.Module):
    """A sample of any shape to a logit."""

    def __init__(self, shape: tuple[int, ...], *, num_classes: int, hidden_dim: int) -> None:
        super().__init__()
        self.body = hidden_layers(torch.Size(shape).numel(), hidden_dim)
        self.head = ProjectionHead(hidden_dim, num_classes)

    def forward(self, x_BX: Tensor, label_B: Tensor | None) -> Tensor:
        return self.head(self.body(x_BX.flatten(1)), label_B)
