"""What may be asked of style transfer: a decoder that gives images the style of others, or of one picture."""

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal

from pydantic import Field

from shared.specs.spec import DatasetId, Direction, Modality, wrong
from shared.specs.training import TrainSpec

Encoder = Literal["digits", "vgg19"]

RECIPES: Final[Mapping[Encoder, Mapping[str, Any]]] = {
    "digits": {"base_channels": 16, "learning_rate": 2e-3},
    "vgg19": {"base_channels": 64, "learning_rate": 1e-4},
}
"""A decoder about as large as the encoder, and how fast it learns."""

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "xs": {"encoder": "digits", **RECIPES["digits"]},
    "s": {"encoder": "digits", **RECIPES["digits"], "base_channels": 32},
    "b": {"encoder": "vgg19", **RECIPES["vgg19"]},
}
"""Sizes from two CPU cores (``xs``) to one large GPU (``b``, with the operator's VGG-19)."""

SMALLEST_SIDES: Final[Mapping[Encoder, int]] = {"digits": 2, "vgg19": 8}
"""Pixels of images that are halved to one."""

COLOURED: Final[frozenset[Encoder]] = frozenset({"vgg19"})
"""Encoders that look at three colours at once, of which grey is one; the others look at each channel by itself."""


class StyleSpec(TrainSpec):
    """Learn to draw the images of ``dataset`` in the styles of ``style_dataset``: AdaIN (Huang and Belongie, 2017).

    What is left out follows from ``preset`` (``PRESETS``), or from another ``encoder`` than it has (``RECIPES``).
    Matching a style by descent (Gatys et al., 2016) needs the encoder alone: a training of one step will do.
    """

    modality: ClassVar[Modality] = "image"
    tasks: ClassVar[Mapping[str, frozenset[str]]] = {
        "stylise": frozenset(),
        "match_style": frozenset({"steps"}),
        "reconstruct": frozenset(),
    }
    further_datasets: ClassVar[tuple[str, ...]] = ("style_dataset",)
    architecture: ClassVar[frozenset[str]] = frozenset({"preset", "encoder", "base_channels"})

    family: Literal["style"]
    style_dataset: DatasetId
    """The styles to learn: images of the same size and number of channels as those of ``dataset``; it may be the same
    dataset."""
    preset: Literal["xs", "s", "b"] = "xs"
    """What sees and how large the decoder is, where the fields below leave it open: from two CPU cores to one large
    GPU."""
    encoder: Encoder = "digits"
    """In whose features style is compared: a shipped classifier of grey digits, or VGG-19 up to relu4_1 where the
    operator has put its weights. It becomes a frozen part of the model."""
    base_channels: int = Field(default=16, ge=4, le=512)
    """Channels of the decoder at the image's own resolution, doubled at each halving."""
    style_weight: float = Field(default=10.0, ge=0, le=1e6)
    """Weight of the distance between the statistics of features, beside that between the features themselves."""
    batch_size: int = Field(default=16, ge=1, le=65_536)
    """Images of each dataset per optimizer step."""
    learning_rate: float = Field(default=2e-3, gt=0, le=1)
    """Peak learning rate of AdamW."""

    @classmethod
    def derived(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        sizes = PRESETS.get(str(given.get("preset", "xs")), PRESETS["xs"])
        encoder = "vgg19" if given.get("encoder", sizes["encoder"]) == "vgg19" else "digits"
        return sizes if encoder == sizes["encoder"] else RECIPES[encoder]

    def compared_by(self) -> Mapping[str, Direction]:
        """The loss and what it is made of."""
        return {"loss": "lower", "content": "lower", "style": "lower"}

    def feature_networks(self) -> Mapping[str, str]:
        return {"encoder": self.encoder}

    def check_data(self, infos: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse, beside what any family refuses, images that the encoder cannot look at."""
        super().check_data(infos)
        channels, *sides = infos["dataset"]["shape"]
        if min(sides) < (smallest := SMALLEST_SIDES[self.encoder]):
            raise wrong("dataset", f"{self.encoder} looks at sides of at least {smallest} pixels, not {min(sides)}")
        if self.encoder in COLOURED and channels not in (1, 3):
            raise wrong("dataset", f"{self.encoder} looks at 1 or 3 channels; the images have {channels}")
