"""FID's network: its layout, how it looks at images, and which files it is read from. The weights are random."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shared.errors import ModelLoadFailed
from tests.metrics.conftest import strokes, weights_of
from worker.metrics.features import features_of
from worker.metrics.inception import Inception, pooled, resized


def weights() -> dict[str, Tensor]:
    return weights_of(Inception, **{"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("networks")
    save_file(weights(), path / "inception.safetensors")
    return path


def test_it_has_the_layers_of_inception_v3() -> None:
    """94 convolutions, and torchvision's 23,834,568 parameters without the auxiliary head, less its classifier's."""
    with torch.device("meta"):
        net = Inception()

    assert sum(isinstance(one, torch.nn.Conv2d) for one in net.modules()) == 94
    assert sum(one.numel() for one in net.parameters()) == 23_834_568 - 1000 * 2049
    names = {"Mixed_5b.branch5x5_1.conv.weight", "Mixed_7c.branch3x3dbl_3b.bn.running_var", "Conv2d_1a_3x3.bn.bias"}
    assert names < net.state_dict().keys()


def test_features_are_those_of_the_file(folder: Path) -> None:
    features = features_of("inception", folder)
    grey = strokes(2)

    of_grey = features.of(grey)

    assert of_grey.shape == (2, 2048) and of_grey.isfinite().all() and not torch.equal(of_grey[0], of_grey[1])
    assert torch.equal(of_grey, features.of(grey.expand(-1, 3, -1, -1)))
    assert features.digest == hashlib.sha256((folder / "inception.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("size", [28, 64, 299, 400])
def test_images_are_resized_from_corner_to_corner(size: int) -> None:
    """Pixel i lies at i * H / 299, between the two pixels around it; beyond the last pixel there is only that one."""
    image = torch.arange(float(size)).square()[None, None, :, None].expand(1, 1, size, size)

    made = resized(image, 299)[0, 0, :, 0]

    for place in (0, 1, 2, 150, 297, 298):
        low = place * size // 299
        share = place * size / 299 - low
        expected = (1 - share) * low**2 + share * min(low + 1, size - 1) ** 2
        assert made[place].item() == pytest.approx(expected, rel=1e-5)


def test_a_mean_leaves_the_padding_out() -> None:
    assert torch.equal(pooled(torch.ones(1, 1, 5, 5), "mean"), torch.ones(1, 1, 5, 5))


def test_without_a_folder_there_is_no_inception() -> None:
    with pytest.raises(ModelLoadFailed, match="NOISEMILL_WORKER_FEATURE_NETWORKS is not set"):
        features_of("inception", None)


def test_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="inception.safetensors cannot be read"):
        features_of("inception", tmp_path)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "inception.safetensors").write_bytes(b"\x80\x04\x95" + bytes(100))

    with pytest.raises(ModelLoadFailed, match="no safetensors file"):
        features_of("inception", tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "trouble"),
    [
        ("Mixed_6e.branch7x7_2.conv.weight", None, "lacks Mixed_6e.branch7x7_2.conv.weight"),
        ("Conv2d_3b_1x1.conv.weight", torch.zeros(80, 64, 3, 3), "Conv2d_3b_1x1.conv.weight"),
    ],
)
def test_a_file_of_another_network_is_refused(tmp_path: Path, name: str, tensor: Tensor | None, trouble: str) -> None:
    changed = weights() | ({} if tensor is None else {name: tensor})
    if tensor is None:
        del changed[name]
    save_file(changed, tmp_path / "inception.safetensors")

    with pytest.raises(ModelLoadFailed, match=trouble):
        features_of("inception", tmp_path)
