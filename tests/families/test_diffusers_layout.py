"""UNets as folders of diffusers, by the library itself."""

import inspect
import json
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from shared.errors import ModelLoadFailed
from shared.specs.diffusers_folder import CONFIG, WEIGHTS
from shared.specs.diffusers_unet import UNetConfig
from shared.specs.unet import UNETS, UNetLayout
from worker.families.nets.diffusers_layout import config_of, fill_from_folder, write_folder
from worker.families.nets.unet import UNet
from worker.kernels.noise import Domain, Noise

NetT = TypeVar("NetT", bound=nn.Module)

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


def filled(net: NetT) -> NetT:
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


def read(folder: Path) -> UNet:
    """The network of a folder."""
    config = UNetConfig.of_folder(json.loads((folder / CONFIG).read_text()))
    net = UNet(config.layout(), config.in_channels, (config.num_class_embeds or 1) - 1, config.dropout)
    fill_from_folder(net, folder / WEIGHTS)
    return net


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

    ours = read(tmp_path / "theirs").eval()
    write_folder(tmp_path / "ours", ours, (3, 32, 32), {})

    assert ours.layout == UNETS["b"]
    assert difference(ours, theirs, 1) <= 1e-5
    assert difference(ours, UNet2DModel.from_pretrained(tmp_path / "ours").eval(), 1) <= 1e-5


def test_a_network_of_patches_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="single pixels"):
        write_folder(tmp_path, UNet(UNETS["xs"], 3), (3, 32, 32), {})


def test_a_network_of_stretched_time_is_told_it_stretched(tmp_path: Path) -> None:
    ours = filled(UNet(UNETS["s"], 3))
    write_folder(tmp_path, ours, (3, 32, 32), {})  # pyright: ignore[reportArgumentType]
    theirs, (x, t, label) = UNet2DModel.from_pretrained(tmp_path).eval(), images(3)

    ours.time_scale = 100.0

    assert (ours(x, t / 100, label) - theirs(x, t).sample).abs().max() <= 1e-5
    assert (ours(x, t / 100, label) - theirs(x, t / 100).sample).abs().max() > 0.05


def test_another_preset_is_understood_too(tmp_path: Path) -> None:
    ours = filled(UNet(UNETS["s"], 3, num_classes=4))
    write_folder(tmp_path, ours, (3, 32, 32), {})

    assert difference(ours, UNet2DModel.from_pretrained(tmp_path).eval(), 3) <= 1e-5


def test_a_folder_that_was_written_is_read_again(tmp_path: Path) -> None:
    ours = filled(UNet(SMALL, 3, num_classes=4, dropout=0.1))
    write_folder(tmp_path, ours, (3, 32, 24), {})

    again = read(tmp_path)

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
        ("up_block_types", ["AttnUpBlock2D"] + ["UpBlock2D"] * 3),
        ("block_out_channels", "many"),
        ("out_channels", 6),
        ("mid_block_type", None),
        ("brightness", 1),
        ("_class_name", "UNet2DConditionModel"),
    ],
)
def test_another_network_is_refused(field: str, value: Any) -> None:
    config = config_of(UNet(SMALL, 3), (3, 32, 32)) | {field: value}

    with pytest.raises(ValueError, match="is needed" if field == "_class_name" else field):
        UNetConfig.of_folder(config).layout()


@pytest.mark.parametrize("field", ["attention_head_dim", "downsample_padding", "flip_sin_to_cos", "freq_shift"])
def test_a_field_that_is_left_out_has_the_default_of_the_library(field: str) -> None:
    config = config_of(UNet(SMALL, 3), (3, 32, 32))
    del config[field]

    with pytest.raises(ValueError, match=field):
        UNetConfig.of_folder(config).layout()


def test_the_defaults_are_those_of_the_library() -> None:
    theirs = inspect.signature(UNet2DModel.__init__).parameters
    ours = {name: field.default for name, field in UNetConfig.model_fields.items()}

    assert ours == {name: parameter.default for name, parameter in theirs.items() if name != "self"}


SPOILT: dict[str, tuple[Any, str]] = {
    "missing": (lambda tensors: tensors.pop("conv_in.bias"), "1 are missing, the first is 'conv_in.bias'"),
    "extra": (lambda tensors: tensors.update(more=torch.zeros(1)), "1 belong to no layer .* 'more'"),
    "shape": (lambda tensors: tensors.update({"conv_in.bias": torch.zeros(3)}), r"conv_in.bias is \[3\], not \[16\]"),
    "float64": (lambda tensors: tensors.update({"conv_in.bias": torch.zeros(16).double()}), "float32 would round"),
    "integers": (lambda tensors: tensors.update({"conv_in.bias": torch.zeros(16).int()}), "float32 would round"),
    "NaN": (lambda tensors: tensors["conv_in.bias"][3:4].fill_(torch.nan), "conv_in.bias holds what is no finite"),
    "infinite": (lambda tensors: tensors["conv_in.bias"][3:4].fill_(torch.inf), "conv_in.bias holds what is no finite"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_weights_that_are_not_those_of_the_network_are_refused(how: str, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in UNet(SMALL, 3).state_dict().items()}
    spoil, message = SPOILT[how]
    spoil(tensors)
    save_file(tensors, tmp_path / WEIGHTS)

    with pytest.raises(ModelLoadFailed, match=message):
        fill_from_folder(UNet(SMALL, 3), tmp_path / WEIGHTS)


def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    torch.save({"conv_in.bias": torch.zeros(16)}, tmp_path / WEIGHTS)

    with pytest.raises(ModelLoadFailed, match="cannot be read"):
        fill_from_folder(UNet(SMALL, 3), tmp_path / WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_weights_are_taken_as_the_numbers_that_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    rounded = {name: tensor.to(dtype) for name, tensor in filled(UNet(SMALL, 3)).state_dict().items()}
    save_file(rounded, tmp_path / WEIGHTS)

    fill_from_folder(net := UNet(SMALL, 3), tmp_path / WEIGHTS)

    assert all(torch.equal(tensor, rounded[name].float()) for name, tensor in net.state_dict().items())


def test_attention_of_older_folders_is_found_by_its_former_names(tmp_path: Path) -> None:
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state, renamed = filled(UNet(SMALL, 3)).state_dict(), {}
    for name, tensor in state.items():
        for now, then in former.items():
            name = name.replace(now, then)  # noqa: PLW2901
        renamed[name] = tensor
    save_file(renamed, tmp_path / WEIGHTS)

    fill_from_folder(net := UNet(SMALL, 3), tmp_path / WEIGHTS)

    assert renamed.keys() != state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_a_network_in_nhwc_is_as_exact() -> None:
    ours = filled(UNet(UNETS["s"], 3))
    theirs = UNet2DModel(**{**config_of(ours, (3, 32, 32)), "num_class_embeds": None})
    theirs.load_state_dict(ours.state_dict())

    laid_out = ours.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    assert difference(laid_out, theirs.eval(), 2) <= 1e-5
