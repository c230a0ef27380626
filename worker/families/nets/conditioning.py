"""How classes enter a GAN: beside the generator's latent, and by projection in the discriminator.

Shape suffixes: B = batch, Z = latent, F = features.
"""

import torch
from torch import Tensor, nn


class LabelledLatent(nn.Module):
    """A latent with its class's embedding beside it; the latent alone where there are no classes."""

    def __init__(self, latent_dim: int, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, latent_dim) if num_classes else None
        self.num_features = 2 * latent_dim if num_classes else latent_dim

    def forward(self, z_BZ: Tensor, label_B: Tensor | None) -> Tensor:
        if self.embedding is None or label_B is None:
            return z_BZ
        return torch.cat((z_BZ, self.embedding(label_B)), dim=1)


class ProjectionHead(nn.Module):
    """``psi(f) + <embed(y), f>`` (Miyato and Koyama, 2018, arXiv 1802.05637); ``psi(f)`` where there are no classes."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.psi = nn.Linear(num_features, 1)
        self.embedding = nn.Embedding(num_classes, num_features) if num_classes else None
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, std=num_features**-0.5)

    def forward(self, f_BF: Tensor, label_B: Tensor | None) -> Tensor:
        """Logits of shape ``(B,)``, in float32 at least."""
        logits_B = self.psi(f_BF).squeeze(1)
        if self.embedding is not None and label_B is not None:
            logits_B = logits_B + (self.embedding(label_B) * f_BF).sum(1)
        return logits_B.to(torch.promote_types(logits_B.dtype, torch.float32))
