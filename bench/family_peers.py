"""What other families are measured against: a conv VAE in pythae's own training loop, and PyTorch's tutorial of DCGAN.

Both have the sizes and begin with the weights of our networks, which are written down here once more in plain torch:
what makes ours fast must not make them fast as well.
"""

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor, nn

from bench.timing import Step
from shared.specs import VaeSpec

PYTHAE: Final = "pythae"


def beginning_with(weights: Iterable[Tensor], net: nn.Module) -> nn.Module:
    """``net`` with these weights, in their order."""
    with torch.no_grad():
        for own, given in zip(net.parameters(), weights, strict=True):
            own.copy_(given)
    return net


# Conv VAE ----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two normalised 3x3 convolutions around a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(nn.functional.silu(self.norm1(x)))
        return x + self.conv2(nn.functional.silu(self.norm2(hidden)))


def vae_encoder(base: int, latent_dim: int) -> nn.Module:
    """Images ``(B, 1, 28, 28)`` to mean and log variance, one beside the other."""
    return nn.Sequential(
        nn.Conv2d(1, base, 4, stride=2, padding=1), Residual(base),
        nn.Conv2d(base, 2 * base, 4, stride=2, padding=1), Residual(2 * base),
        nn.GroupNorm(8, 2 * base), nn.SiLU(), nn.Flatten(), nn.Linear(2 * base * 49, 2 * latent_dim),
    )  # fmt: skip


def vae_decoder(base: int, latent_dim: int) -> nn.Module:
    """A latent to logits ``(B, 1, 28, 28)``."""
    return nn.Sequential(
        nn.Linear(latent_dim, 2 * base * 49), nn.Unflatten(1, (2 * base, 7, 7)), Residual(2 * base),
        nn.GroupNorm(8, 2 * base), nn.SiLU(), nn.ConvTranspose2d(2 * base, base, 4, stride=2, padding=1),
        Residual(base), nn.GroupNorm(8, base), nn.SiLU(), nn.ConvTranspose2d(base, 1, 4, stride=2, padding=1),
    )  # fmt: skip


def pythae_epoch(encoder: nn.Module, decoder: nn.Module, images: Tensor, spec: VaeSpec, folder: str) -> Step:
    """One epoch of pythae's trainer over ``images`` (bytes): its VAE, data set, loader and loop, as its README says.

    Its best model, which it copies after an epoch, and the files that it writes in the end, to ``folder``, are not in
    this.

    Raises:
        ImportError: pythae, or something that it imports, is not installed.
    """
    models, trainers, bases = (import_module(f"{PYTHAE}.{name}") for name in ("models", "trainers", "models.nn"))
    datasets, outputs = import_module(f"{PYTHAE}.data.datasets"), import_module(f"{PYTHAE}.models.base.base_utils")
    own_encoder, own_decoder = bases.BaseEncoder(), bases.BaseDecoder()
    own_encoder.net, own_decoder.net = encoder, decoder

    def encode(x: Tensor) -> Any:
        mean, log_variance = encoder(x).chunk(2, dim=1)
        return outputs.ModelOutput(embedding=mean, log_covariance=log_variance)

    own_encoder.forward = encode
    own_decoder.forward = lambda z: outputs.ModelOutput(reconstruction=decoder(z).sigmoid())
    shape = tuple(images.shape[1:])
    config = models.VAEConfig(input_dim=shape, latent_dim=spec.latent_dim, reconstruction_loss="bce")
    trainer = trainers.BaseTrainer(
        model=models.VAE(model_config=config, encoder=own_encoder, decoder=own_decoder),
        train_dataset=datasets.BaseDataset(images.float() / 255, torch.ones(len(images))),
        training_config=trainers.BaseTrainerConfig(
            output_dir=folder,
            per_device_train_batch_size=spec.batch_size,
            optimizer_cls="AdamW",
            learning_rate=spec.learning_rate,
            no_cuda=True,
        ),
    )
    trainer.prepare_training()
    return lambda: trainer.train_step(epoch=1)


# DCGAN -------------------------------------------------------------------------------------------


def gan_generator(base: int, latent_dim: int) -> nn.Module:
    """A latent to images ``(B, 1, 28, 28)`` in [-1, 1]."""
    return nn.Sequential(
        nn.Linear(latent_dim, 2 * base * 49), nn.Unflatten(1, (2 * base, 7, 7)),
        nn.BatchNorm2d(2 * base), nn.ReLU(inplace=True), nn.ConvTranspose2d(2 * base, base, 4, stride=2, padding=1),
        nn.BatchNorm2d(base), nn.ReLU(inplace=True), nn.ConvTranspose2d(base, 1, 4, stride=2, padding=1), nn.Tanh(),
    )  # fmt: skip


def gan_discriminator(base: int) -> nn.Module:
    """Images to the probability that they are real, ``(B,)``."""
    return nn.Sequential(
        nn.Conv2d(1, base, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(base, 2 * base, 4, stride=2, padding=1), nn.BatchNorm2d(2 * base), nn.LeakyReLU(0.2, inplace=True),
        nn.Flatten(), nn.Linear(2 * base * 49, 1), nn.Flatten(0), nn.Sigmoid(),
    )  # fmt: skip


def tutorial_step(generator: nn.Module, discriminator: nn.Module, images: Tensor, latent_dim: int) -> Step:
    """The body of the tutorial's loop, on one batch of bytes: BCE, two Adam optimizers, its figures read each step."""
    real = images.float() / 127.5 - 1
    generator, discriminator = generator.train(), discriminator.train()
    of_d, of_g = (torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.999)) for net in (discriminator, generator))
    criterion = nn.BCELoss()

    def steps() -> Iterator[float]:
        discriminator.zero_grad()
        label = torch.full((len(real),), 1.0)
        of_real = discriminator(real)
        loss_of_real = criterion(of_real, label)
        loss_of_real.backward()
        yield of_real.mean().item()
        fake = generator(torch.randn(len(real), latent_dim))
        label.fill_(0.0)
        of_fake = discriminator(fake.detach())
        loss_of_fake = criterion(of_fake, label)
        loss_of_fake.backward()
        yield of_fake.mean().item()
        yield (loss_of_real + loss_of_fake).item()
        of_d.step()
        generator.zero_grad()
        label.fill_(1.0)
        of_fake = discriminator(fake)
        loss = criterion(of_fake, label)
        loss.backward()
        yield of_fake.mean().item()
        yield loss.item()
        of_g.step()

    return lambda: list(steps())
