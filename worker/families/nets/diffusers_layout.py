"""A UNet as a folder of diffusers' ``UNet2DModel``: its configuration, and weights as safetensors.

Knows the layout, not the library. Times and outputs are those of the network itself: ``time_scale`` times what it is
told here, and whatever its objective has it predict.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.errors import ModelLoadFailed
from shared.specs.diffusers_folder import CONFIG, WEIGHTS
from shared.specs.diffusers_unet import CLASS_NAME, fields_of
from worker.families.nets.unet import UNet

FORMER_NAMES: Final[Mapping[str, str]] = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Of attention's layers, in folders written before 2023."""
EXACT: Final = frozenset({torch.float32, torch.float16, torch.bfloat16})
"""Types that become float32 without rounding."""


def config_of(net: UNet, shape: tuple[int, ...]) -> dict[str, Any]:
    """The configuration of a network for images of ``shape`` ``(C, H, W)``.

    Raises:
        ValueError: it sees squares of pixels as one or pads such images, which ``UNet2DModel`` has no word for.
    """
    if net.layout.patch_size > 1:
        raise ValueError("UNet2DModel sees single pixels: this network cannot be exported")
    channels, height, width = shape
    if height % (multiple := net.layout.multiple) or width % multiple:
        raise ValueError(f"UNet2DModel pads nothing: it takes images whose sides are multiples of {multiple}")
    return {
        "_class_name": CLASS_NAME,
        **fields_of(net.layout),
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": channels,
        "dropout": net.dropout.probability,
        "num_class_embeds": net.class_embedding.num_embeddings if net.class_embedding else None,
    }


def write_folder(folder: Path, net: UNet, shape: tuple[int, ...], told: Mapping[str, Any]) -> None:
    """Write what ``UNet2DModel.from_pretrained`` reads, and ``told`` into its configuration; the last class of
    ``num_class_embeds`` stands for none."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, {**config_of(net, shape), **told})
    # What it was told of augmented images says nothing about others, and ``UNet2DModel`` has no word for it.
    state = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("augmentation_embedding")}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write it so that equal content gives equal bytes."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def fill_from_folder(net: UNet, weights: Path) -> None:
    """Copy the weights of a folder into a network of its layout, each as the number that it is.

    Raises:
        ModelLoadFailed: the file is damaged, or its tensors are not those of the network, rounded or no numbers.
    """
    try:
        found = {_current(name): tensor for name, tensor in load_file(weights).items()}
    except (OSError, SafetensorError) as error:
        raise ModelLoadFailed(f"the weights cannot be read: {error}") from error
    expected = net.state_dict()
    _require_names(sorted(expected.keys() - found.keys()), "are missing")
    _require_names(sorted(found.keys() - expected.keys()), "belong to no layer of the network")
    for name, tensor in found.items():
        _require_fit(name, tensor, expected[name])
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(found[name])


def _require_names(wrong: list[str], what: str) -> None:
    if wrong:
        raise ModelLoadFailed(f"the weights do not fit: {len(wrong)} {what}, the first is {wrong[0][:200]!r}")


def _require_fit(name: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise ModelLoadFailed(f"the weights do not fit: {name} is {list(found.shape)}, not {list(expected.shape)}")
    if found.dtype not in EXACT:
        raise ModelLoadFailed(f"the weights do not fit: {name} is {found.dtype}, which float32 would round")
    if not found.isfinite().all():
        raise ModelLoadFailed(f"the weights are spoilt: {name} holds what is no finite number")


def _current(name: str) -> str:
    """Today's name of a weight."""
    return ".".join(FORMER_NAMES.get(word, word) for word in name.split("."))
