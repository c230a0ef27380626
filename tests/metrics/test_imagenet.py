"""The network of photographs: its layout, how it pads, and which files it is read from. The weights are random."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shared.errors import ModelLoadFailed
from tests.metrics.conftest import strokes, weights_of
from worker.metrics.efficientnet import Convolution, EfficientNetLite
from worker.metrics.features import brought_to, features_of


def weights() -> dict[str, Tensor]:
    return weights_of(EfficientNetLite, **{"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("networks")
    save_file(weights(), path / "imagenet.safetensors")
    return path


def test_it_has_the_layers_of_efficientnet_lite0() -> None:
    """The paper's 4,652,008 parameters, less its classifier's."""
    with torch.device("meta"):
        net = EfficientNetLite()

    assert sum(one.numel() for one in net.parameters()) == 4_652_008 - 1000 * 1281
    names = {"_conv_stem.weight", "_blocks.0._depthwise_conv.weight", "_blocks.15._bn2.running_var", "_bn1.bias"}
    assert names < net.state_dict().keys()
    assert "_blocks.0._expand_conv.weight" not in net.state_dict()


@pytest.mark.parametrize(("size", "kernel", "stride"), [(224, 3, 2), (112, 5, 2), (7, 5, 2), (14, 5, 1), (7, 3, 1)])
def test_a_map_is_padded_as_tensorflow_pads_it(size: int, kernel: int, stride: int) -> None:
    """A place sums up what its kernel covers, which begins half of the padding before the first pixel, rounded down."""
    conv = Convolution(1, 1, kernel, stride=stride).requires_grad_(requires_grad=False)
    conv.weight.fill_(1)
    line = torch.arange(1.0, size + 1)

    made = conv(line[None, None, None].expand(1, 1, size, size))[0, 0, size // stride // 2]

    num_out = -(-size // stride)
    before = max((num_out - 1) * stride + kernel - size, 0) // 2
    starts = [place * stride - before for place in range(num_out)]
    assert (made / kernel).tolist() == [line[max(0, one) : one + kernel].sum().item() for one in starts]


def test_features_are_those_of_the_file(folder: Path) -> None:
    features = features_of("imagenet", folder)
    grey = strokes(2)

    of_grey = features.of(grey)

    assert of_grey.shape == (2, 1280) and of_grey.isfinite().all() and not torch.equal(of_grey[0], of_grey[1])
    assert torch.equal(of_grey, features.of(grey.expand(-1, 3, -1, -1)))
    assert features.digest == hashlib.sha256((folder / "imagenet.safetensors").read_bytes()).hexdigest()


def test_black_and_white_are_seen_about_minus_one_and_one(folder: Path) -> None:
    net, seen = EfficientNetLite.read(folder / "imagenet.safetensors"), list[Tensor]()
    net.get_submodule("_conv_stem").register_forward_pre_hook(lambda _, given: seen.append(given[0]))

    net(brought_to(torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None], channels=3, resolution=224))

    assert seen[0].mean((2, 3)).tolist() == [[-127 / 128] * 3, [1.0] * 3]


def test_without_a_folder_there_is_no_such_network() -> None:
    with pytest.raises(ModelLoadFailed, match="the features imagenet need weights"):
        features_of("imagenet", None)


@pytest.mark.parametrize("name", ["_blocks.3._project_conv.weight", "_bn1.running_mean"])
def test_a_file_of_another_network_is_refused(tmp_path: Path, name: str) -> None:
    save_file({key: tensor for key, tensor in weights().items() if key != name}, tmp_path / "imagenet.safetensors")

    with pytest.raises(ModelLoadFailed, match=f"lacks {name}"):
        features_of("imagenet", tmp_path)
