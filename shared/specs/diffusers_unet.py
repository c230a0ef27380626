"""The configuration of diffusers' ``UNet2DModel``, and which UNet of ours it describes.

Knows the library's words, neither the library nor torch, so that the API can refuse what no UNet of ours is.
"""

from collections.abc import Mapping
from reprlib import repr as shown
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from shared.specs.noising import DDPM, Objective, Process
from shared.specs.unet import NORM_EPS, UNetLayout

CLASS_NAME: Final = "UNet2DModel"
TOLD: Final = "_noisemill"
"""The field in which our exports say what the library has no words for, and which it leaves alone as private."""
FIXED: Final[Mapping[str, Any]] = {
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
"""What every UNet of ours has in common and the library has otherwise, or had once."""


class Told(BaseModel):
    """What a network was trained to predict, and how it is told the time."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    objective: Objective
    num_classes: int | None = Field(default=None, ge=0)
    """Zero for a network without classes; None where that is not told."""
    sigma_data: float | None = Field(default=None, gt=0, le=10)
    """Of ``edm`` alone."""
    time_scale: float | None = None
    """By what ``c_noise`` of ``edm`` is multiplied before the network is told it."""
    process: Process = DDPM
    """Of ``eps``, ``v`` and ``x0``."""


class UNetConfig(BaseModel):
    """Its fields, with the library's defaults, which stand for what a folder leaves out."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = Field(default=(224, 448, 672, 896), min_length=1, max_length=16)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    @classmethod
    def of_folder(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """That of ``config.json``.

        Raises:
            ValueError: it is of another class, or not as that class has it.
        """
        if (name := config.get("_class_name")) != CLASS_NAME:
            raise ValueError(f"it is of {shown(name)}, and {CLASS_NAME} is needed")
        return cls.model_validate({name: value for name, value in config.items() if not name.startswith("_")})

    def layout(self) -> UNetLayout:
        """The shape of the UNet.

        Raises:
            ValueError: ours are others in some fields, which are named.
        """
        with_attention = [level for level, kind in enumerate(self.down_block_types) if kind == "AttnDownBlock2D"]
        layout = UNetLayout(
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            attention_level=with_attention[0] if with_attention else -1,
            norm_num_groups=self.norm_num_groups,
        )
        ours = UNetConfig.model_validate(fields_of(layout) | {"out_channels": self.in_channels})
        free = {"sample_size", "in_channels", "dropout", "num_class_embeds", "num_train_timesteps"}
        compared = [name for name in UNetConfig.model_fields if name not in free]
        other = [name for name in compared if getattr(self, name) != getattr(ours, name)]
        if other:
            told = [f"{name} ({shown(getattr(self, name))}, not {shown(getattr(ours, name))})" for name in other]
            raise ValueError(f"it differs from UNets of ours in {', '.join(told)}")
        return layout


def fields_of(layout: UNetLayout) -> dict[str, Any]:
    """The fields that say how a UNet of single pixels is made."""
    return {
        **FIXED,
        "block_out_channels": list(layout.block_out_channels),
        "layers_per_block": layout.layers_per_block,
        "norm_num_groups": layout.norm_num_groups,
        "down_block_types": _block_types(layout, "Down"),
        "up_block_types": _block_types(layout, "Up")[::-1],
    }


def _block_types(layout: UNetLayout, direction: str) -> list[str]:
    """Names of the levels' blocks, finest first."""
    attends = ["Attn" if level == layout.attention_level else "" for level in range(layout.num_levels)]
    return [f"{prefix}{direction}Block2D" for prefix in attends]
