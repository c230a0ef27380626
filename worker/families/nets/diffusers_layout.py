"""A UNet as a folder of diffusers' ``UNet2DModel``: its configuration, and weights as safetensors.

Knows the layout, not the library. Times are told and outputs meant as the objective has them, of which the folder
says nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from shared.errors import ModelLoadFailed
from worker.families.nets.unet import NORM_EPS, UNet, UNetLayout

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
FIXED: Final[Mapping[str, Any]] = {
    "_class_name": "UNet2DModel",
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "mid_block_scale_factor": 1,
    "downsample_padding": 0,
    "act_fn": "silu",
    "attention_head_dim": None,
    "norm_eps": NORM_EPS,
}
"""What every UNet of ours has in common."""
DEFAULTS: Final[Mapping[str, Any]] = {
    "add_attention": True,
    "class_embed_type": None,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "resnet_time_scale_shift": "default",
    "mid_block_type": "UNetMidBlock2D",
    "attn_norm_num_groups": None,
    "time_embedding_dim": None,
}
"""Fields that older folders leave out, and that ours do not need; with other values it is another network."""
FORMER_NAMES: Final[Mapping[str, str]] = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Of attention's layers, in folders written before 2023."""


def block_types(layout: UNetLayout, direction: str) -> list[str]:
    """Names of the levels' blocks, finest first."""
    attends = ["Attn" if level == layout.attention_level else "" for level in range(layout.num_levels)]
    return [f"{prefix}{direction}Block2D" for prefix in attends]


def config_of(net: UNet, shape: tuple[int, ...]) -> dict[str, Any]:
    """The configuration of a network for images of ``shape`` ``(C, H, W)``.

    Raises:
        ValueError: it sees squares of pixels as one, stretches time or pads such images, which ``UNet2DModel`` has no
            word for.
    """
    if net.layout.patch_size > 1 or net.time_scale != 1:
        raise ValueError("UNet2DModel sees single pixels, and time as it is told: this network cannot be exported")
    channels, height, width = shape
    if height % (multiple := net.layout.multiple) or width % multiple:
        raise ValueError(f"UNet2DModel pads nothing: it takes images whose sides are multiples of {multiple}")
    return {
        **FIXED,
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": list(net.layout.block_out_channels),
        "layers_per_block": net.layout.layers_per_block,
        "norm_num_groups": net.layout.norm_num_groups,
        "down_block_types": block_types(net.layout, "Down"),
        "up_block_types": block_types(net.layout, "Up")[::-1],
        "dropout": net.dropout.probability,
        "num_class_embeds": net.class_embedding.num_embeddings if net.class_embedding else None,
    }


def write_folder(folder: Path, net: UNet, shape: tuple[int, ...]) -> None:
    """Write what ``UNet2DModel.from_pretrained`` reads; the last class of ``num_class_embeds`` stands for none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config_of(net, shape), indent=2, sort_keys=True) + "\n", "utf-8")
    # What it was told of augmented images says nothing about others, and ``UNet2DModel`` has no word for it.
    state = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("augmentation_embedding")}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read_folder(folder: Path) -> UNet:
    """The network of a folder, on the CPU.

    Raises:
        ModelLoadFailed: the folder is damaged, or its network is not one of ours.
    """
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        tensors = {_current(name): tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
        layout = _layout_of(config)
        num_classes = (config.get("num_class_embeds") or 1) - 1
        net = UNet(layout, config["in_channels"], num_classes, config.get("dropout", 0.0))
        net.load_state_dict(tensors)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelLoadFailed(f"{folder.name} is no UNet of this layout: {error}") from error
    return net


def _layout_of(config: Mapping[str, Any]) -> UNetLayout:
    """The layout of a configuration; ValueError if there is none."""
    kinds = config["down_block_types"]
    with_attention = [level for level, kind in enumerate(kinds) if kind == "AttnDownBlock2D"]
    layout = UNetLayout(
        block_out_channels=tuple(config["block_out_channels"]),
        layers_per_block=config["layers_per_block"],
        attention_level=with_attention[0] if with_attention else -1,
        norm_num_groups=config["norm_num_groups"],
    )
    expected = {
        **FIXED,
        **{name: value for name, value in DEFAULTS.items() if name in config},
        "out_channels": config["in_channels"],
        "down_block_types": block_types(layout, "Down"),
        "up_block_types": block_types(layout, "Up")[::-1],
    }
    other = [name for name, value in expected.items() if config.get(name) != value]
    if other:
        raise ValueError(f"it differs in {', '.join(other)}")
    return layout


def _current(name: str) -> str:
    """Today's name of a weight."""
    return ".".join(FORMER_NAMES.get(word, word) for word in name.split("."))
