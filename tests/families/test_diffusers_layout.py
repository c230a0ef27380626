"""UNets as folders of diffusers, by the library itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from shared.errors import ModelLoadFailed
from worker.families.nets.diffusers_layout import CONFIG, config_of, read_folder, write_folder
from worker.families.nets.unet import UNETS, UNet, UNetLayout
from worker.kernels.noise import Domain, Noise

CPU = torch.device("cpu")
SMALL = UNetLayout(block_out_channels=(16, 32, 32, 32), layers_per_block=2, attention_level=1, norm_num_groups=8)
DDPM_CIFAR10: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "norm_eps": 1e-6,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "attention_head_dim": None,
}
"""The configuration of google/ddpm-cifar10-32."""


def filled(net: nn.Module) -> nn.Module:
    """The network with weights none of which is zero."""
    for number, parameter in enumerate(net.eval().requires_grad_(requires_grad=False).parameters()):
        drawn = Noise.of_step(Domain.TRAINING, 1, number, range(1), CPU).normal(*parameter.shape)[0]
        parameter.copy_(
            parameter.round() + 0.1 * drawn if parameter.ndim == 1 else drawn * parameter[0].numel() ** -0.5
        )
    return net


def images(num: int, channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, times and classes."""
    x = Noise.of_step(Domain.SAMPLING, 2, 0, range(num), CPU).normal(channels, 32, 32)
    return x, torch.linspace(3, 900, num), torch.arange(num)


def difference(ours: nn.Module, theirs: nn.Module, num: int) -> float:
    x, t, label = images(num)
    classes = {"class_labels": label} if ours.class_embedding else {}
    expected = theirs.forward(x, t, **classes).sample
    assert expected.std() > 0.05
    return (ours(x, t, label) - expected).abs().max().item()


def test_preset_b_has_the_weights_of_ddpm_on_cifar10() -> None:
    with torch.device("meta"):
        theirs, ours = UNet2DModel(**DDPM_CIFAR10), UNet(UNETS["b"], 3)

    def shapes(net: nn.Module) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in net.state_dict().items()}

    assert shapes(ours) == shapes(theirs)
    assert sum(weight.numel() for weight in ours.parameters()) == 35_746_307


def test_a_folder_of_ddpm_on_cifar10_loads_and_comes_out_again(tmp_path: Path) -> None:
    theirs = UNet2DModel(**DDPM_CIFAR10).eval().requires_grad_(requires_grad=False)
    theirs.save_pretrained(tmp_path / "theirs")

    ours = read_folder(tmp_path / "theirs").eval()
    write_folder(tmp_path / "ours", ours, (3, 32, 32))

    assert ours.layout == UNETS["b"]
    assert difference(ours, theirs, 1) <= 1e-5
    assert difference(ours, UNet2DModel.from_pretrained(tmp_path / "ours").eval(), 1) <= 1e-5


def test_a_network_of_patches_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="single pixels"):
        write_folder(tmp_path, UNet(UNETS["xs"], 3), (3, 32, 32))


def test_a_network_of_stretched_time_is_not_exported(tmp_path: Path) -> None:
    net = UNet(UNETS["s"], 3)
    net.time_scale = 100.0

    with pytest.raises(ValueError, match="time as it is told"):
        write_folder(tmp_path, net, (3, 32, 32))


def test_another_preset_is_understood_too(tmp_path: Path) -> None:
    ours = filled(UNet(UNETS["s"], 3, num_classes=4))
    write_folder(tmp_path, ours, (3, 32, 32))

    assert difference(ours, UNet2DModel.from_pretrained(tmp_path).eval(), 3) <= 1e-5


def test_a_folder_that_was_written_is_read_again(tmp_path: Path) -> None:
    ours = filled(UNet(SMALL, 3, num_classes=4, dropout=0.1))
    write_folder(tmp_path, ours, (3, 32, 24))

    again = read_folder(tmp_path)

    assert (again.layout, again.dropout.probability) == (ours.layout, ours.dropout.probability)
    assert again.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "gelu"),
        ("norm_eps", 1e-5),
        ("flip_sin_to_cos", True),
        ("attention_head_dim", 8),
        ("resnet_time_scale_shift", "scale_shift"),
        ("down_block_types", ["DownBlock2D"] * 3 + ["AttnDownBlock2D"]),
        ("layers_per_block", 1),
        ("block_out_channels", "many"),
    ],
)
def test_another_network_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    net = UNet(SMALL, 3)
    write_folder(tmp_path, net, (3, 32, 32))
    (tmp_path / CONFIG).write_text(json.dumps(config_of(net, (3, 32, 32)) | {field: value}))

    with pytest.raises(ModelLoadFailed):
        read_folder(tmp_path)


def test_a_network_in_nhwc_is_as_exact() -> None:
    ours = filled(UNet(UNETS["s"], 3))
    theirs = UNet2DModel(**{**config_of(ours, (3, 32, 32)), "num_class_embeds": None})
    theirs.load_state_dict(ours.state_dict())

    laid_out = ours.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    assert difference(laid_out, theirs.eval(), 2) <= 1e-5
