"""Images to feature vectors, in which sets of images are compared.

``digits`` is a small classifier of handwritten digits that is shipped with the code; ``pixels`` and ``dct`` know
nothing of any subject; ``inception`` is FID's network and ``imagenet`` a smaller one that has learned photographs, both
read from files of one's own. Another network of one's own is one safetensors file of the layout of ``FeatureNetwork``.
Nothing is ever executed from a file: neither TorchScript nor pickle is read.

Shape suffixes: B = batch, C = channels, H, W = height and width, D = features, K = classes.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import pi, sqrt
from pathlib import Path
from typing import Annotated, Final

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError
from torch import Tensor, nn

from shared.errors import ModelLoadFailed
from shared.specs.spec import Spec
from worker.engine.checkpoint import fill, read_tensors
from worker.metrics.efficientnet import SIDE, EfficientNetLite
from worker.metrics.inception import Inception
from worker.metrics.networks import DIGITS, DIGITS_SHA256, digest_of, find_network

BATCH_OF_LARGE: Final = 32
"""Images of 224 or 299 pixels a side: so many need less than a gigabyte."""
CPU: Final = torch.device("cpu")
DCT_RESOLUTION: Final = 32
"""Side of the square that images are brought to before the cosine transform."""
DCT_SIDE: Final = 8
"""Lowest frequencies kept along each axis."""

Width = Annotated[int, Field(ge=1, le=4096)]


class FeatureNetworkSpec(Spec):
    """The layout of a feature network, as its file describes it."""

    in_channels: int = Field(ge=1, le=4)
    """Colours it looks at; images of other numbers of channels are brought to it."""
    resolution: int = Field(ge=4, le=1024)
    """Side of the square that images are brought to."""
    channels: list[Width] = Field(min_length=1, max_length=32)
    """Of each 3x3 convolution."""
    halve_after: list[int] = Field(max_length=8)
    """The convolutions, counted from 0, whose output is halved by max pooling."""
    num_features: int = Field(ge=1, le=4096)
    """Of the linear layer after the convolutions."""
    num_classes: int = Field(ge=2, le=100_000)
    """Of the linear layer after the features."""

    @property
    def smallest_resolution(self) -> int:
        """Side of the last convolution's output."""
        return self.resolution >> len(self.halve_after)


class FeatureNetwork(nn.Module):
    """3x3 convolutions with ReLU and max pooling, a linear layer with ReLU (the features), a linear classifier."""

    def __init__(self, spec: FeatureNetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        layers: list[nn.Module] = []
        channels_in = spec.in_channels
        for place, channels in enumerate(spec.channels):
            layers += [nn.Conv2d(channels_in, channels, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if place in spec.halve_after else []
            channels_in = channels
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.hidden = nn.Linear(channels_in * spec.smallest_resolution**2, spec.num_features)
        self.head = nn.Linear(spec.num_features, spec.num_classes)

    def features(self, image_BCHW: Tensor) -> Tensor:
        """Bytes of any size and number of colours to float32 ``(B, D)``."""
        spec = self.spec
        grey_BCHW = brought_to(image_BCHW, channels=spec.in_channels, resolution=spec.resolution)
        return F.relu(self.hidden(self.body(grey_BCHW)))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Bytes to class logits ``(B, K)``."""
        return self.head(self.features(image_BCHW))

    @classmethod
    def read(cls, path: Path) -> "FeatureNetwork":
        """The network of a file whose header holds a ``FeatureNetworkSpec`` under ``network``.

        Raises:
            ModelLoadFailed: the file is damaged, or something else.
        """
        tensors, header = read_tensors(path)
        try:
            spec = FeatureNetworkSpec.model_validate(header.get("network"))
        except ValidationError as error:
            raise ModelLoadFailed(f"{path.name} is no feature network: {error}") from error
        # Without memory, so without first weights: those would come from torch's global generator.
        with torch.device("meta"):
            net = cls(spec)
        fill(net.state_dict(), tensors, path.name)
        net.load_state_dict(tensors, assign=True)
        return net.requires_grad_(requires_grad=False).eval()


def brought_to(image_BCHW: Tensor, *, channels: int, resolution: int) -> Tensor:
    """Bytes as float32 in [0, 1], in this number of colours and this size (bilinear, antialiased)."""
    x_BCHW = image_BCHW.float() / 255
    if x_BCHW.shape[1] != channels:
        x_BCHW = x_BCHW.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if x_BCHW.shape[2:] != (resolution, resolution):
        size = (resolution, resolution)
        x_BCHW = F.interpolate(x_BCHW, size=size, mode="bilinear", antialias=True, align_corners=False)
    return x_BCHW


@dataclass(frozen=True, kw_only=True)
class Features:
    """A way to describe images: equal digests describe equally."""

    name: str
    digest: str
    """SHA-256 of the weights, or of what the transform is."""
    extract: Callable[[Tensor], Tensor]
    """Bytes ``(B, C, H, W)`` to float32 ``(B, D)``, on the device of the images."""
    classify: Callable[[Tensor], Tensor] | None = None
    """Bytes to class logits ``(B, K)``, where the features are those of a classifier."""
    num_classes: int = 0
    """That it tells apart."""
    batch_size: int = 256
    """Images that go through it at once."""

    @torch.no_grad()
    def of(
        self, image_BCHW: Tensor, *, device: torch.device = CPU, on_batch: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Features of many images in batches, float32 ``(N, D)`` on the CPU; ``on_batch`` is called before each."""
        described: list[Tensor] = []
        for batch in image_BCHW.split(self.batch_size):
            on_batch()
            described.append(self.extract(batch.to(device)).cpu())
        return torch.cat(described)

    @torch.no_grad()
    def classes(self, image_BCHW: Tensor, *, device: torch.device = CPU) -> Tensor:
        """The most likely class of each image, int64 ``(N,)``; ValueError where the features know no classes."""
        if self.classify is None:
            raise ValueError(f"the features {self.name} know no classes")
        batches = image_BCHW.split(self.batch_size)
        return torch.cat([self.classify(batch.to(device)).argmax(1).cpu() for batch in batches])


def read_features(path: Path, name: str, *, sha256: str | None = None) -> Features:
    """Features of a file's network.

    Raises:
        ModelLoadFailed: the file is damaged, not a ``FeatureNetwork`` or not the one that ``sha256`` names.
    """
    digest = digest_of(path, expected=sha256)
    net = FeatureNetwork.read(path)

    def extract(image_BCHW: Tensor) -> Tensor:
        return net.to(image_BCHW.device).features(image_BCHW)

    def classify(image_BCHW: Tensor) -> Tensor:
        return net.to(image_BCHW.device)(image_BCHW)

    return Features(name=name, digest=digest, extract=extract, classify=classify, num_classes=net.spec.num_classes)


def read_inception(folder: Path | None) -> Features:
    """2,048 features of FID's network, whose weights the operator has put into ``folder``.

    Raises:
        ModelLoadFailed: there is no folder, or no file of these weights in it.
    """
    path, digest = find_network("inception", folder)
    net = Inception.read(path)

    def extract(image_BCHW: Tensor) -> Tensor:
        return net.to(image_BCHW.device)(image_BCHW)

    return Features(name="inception", digest=digest, extract=extract, batch_size=BATCH_OF_LARGE)


def read_imagenet(folder: Path | None) -> Features:
    """1,280 features of a network of photographs, likewise.

    Raises:
        ModelLoadFailed: there is no folder, or no file of these weights in it.
    """
    path, digest = find_network("imagenet", folder)
    net = EfficientNetLite.read(path)

    def extract(image_BCHW: Tensor) -> Tensor:
        return net.to(image_BCHW.device)(brought_to(image_BCHW, channels=3, resolution=SIDE))

    return Features(name="imagenet", digest=digest, extract=extract, batch_size=BATCH_OF_LARGE)


@cache
def digits() -> Features:
    """64 features of a classifier of 28x28 handwritten digits."""
    return read_features(DIGITS, "digits", sha256=DIGITS_SHA256)


def pixels() -> Features:
    """The bytes themselves, in [0, 1]."""
    return _transform("pixels", lambda image_BCHW: (image_BCHW.float() / 255).flatten(1))


def dct() -> Features:
    """The 8x8 lowest frequencies of each colour's orthonormal cosine transform (DCT-II) at 32x32."""
    return _transform(f"dct {DCT_SIDE} of {DCT_RESOLUTION}", _lowest_frequencies)


def _transform(description: str, extract: Callable[[Tensor], Tensor]) -> Features:
    digest = hashlib.sha256(description.encode()).hexdigest()
    return Features(name=description.split(maxsplit=1)[0], digest=digest, extract=extract)


def _lowest_frequencies(image_BCHW: Tensor) -> Tensor:
    x_BCHW = brought_to(image_BCHW, channels=image_BCHW.shape[1], resolution=DCT_RESOLUTION)
    basis = cosine_basis(DCT_SIDE, DCT_RESOLUTION).to(x_BCHW.device)
    return (basis @ x_BCHW @ basis.T).flatten(1)


def cosine_basis(num_frequencies: int, num_places: int) -> Tensor:
    """The first rows of the orthonormal DCT-II matrix, float32 ``(num_frequencies, num_places)``."""
    frequency = torch.arange(num_frequencies, dtype=torch.float64)[:, None]
    place = torch.arange(num_places, dtype=torch.float64)[None]
    basis = (pi * frequency * (2 * place + 1) / (2 * num_places)).cos() * sqrt(2 / num_places)
    basis[0] /= sqrt(2)
    return basis.float()


FEATURES: Final[Mapping[str, Callable[[], Features]]] = {"digits": digits, "pixels": pixels, "dct": dct}
"""What needs no file of the operator's, by the name that it has in ``spec.features`` of an evaluate job."""
FROM_FOLDER: Final[Mapping[str, Callable[[Path | None], Features]]] = {
    "inception": read_inception,
    "imagenet": read_imagenet,
}
"""What needs one, likewise."""


def features_of(name: str, folder: Path | None) -> Features:
    """What ``spec.features`` of an evaluate job stands for, with the operator's networks in ``folder``.

    Raises:
        ModelLoadFailed: the network of this name is not there, or something else.
    """
    return FROM_FOLDER[name](folder) if name in FROM_FOLDER else FEATURES[name]()
