"""What may be asked of an image-to-image translator, learned from two sets of images without pairs."""

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal

from pydantic import Field, model_validator

from shared.specs.spec import DatasetId, Modality, wrong
from shared.specs.tasks import Request, Translate
from shared.specs.training import Betas, TrainSpec, Uses

Objective = Literal["cycle", "contrastive"]

SMALLEST_SIDE: Final = 4
"""Of an image, and of a map that is halved no further."""

RECIPES: Final[Mapping[Objective, Mapping[str, Any]]] = {
    "cycle": {"identity_weight": 5.0},
    "contrastive": {"identity_weight": 1.0},
}
"""The published weight of the loss on images that are there already."""

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "xs": {"base_channels": 8, "num_blocks": 2, "head_dim": 64, "num_patches": 64, "learning_rate": 1e-3},
    "s": {"base_channels": 32, "num_blocks": 6, "head_dim": 128, "num_patches": 128, "learning_rate": 2e-4},
    "b": {
        "base_channels": 64, "num_blocks": 9, "head_dim": 256, "num_patches": 256, "learning_rate": 2e-4,
        "batch_size": 1,
    },
}  # fmt: skip
"""From two CPU cores (``xs``), which have to learn within few steps, to one GPU: ``b`` is as in the papers."""


class TranslationSpec(TrainSpec):
    """Learn to give the images of ``dataset`` the look of ``target_dataset``, keeping what is on them.

    What is left out follows from what is given: ``identity_weight`` from ``objective`` (``RECIPES``), sizes from
    ``preset`` (``PRESETS``).
    """

    modality: ClassVar[Modality] = "image"
    tasks: ClassVar[Mapping[str, frozenset[str]]] = {"translate": frozenset()}
    further_datasets: ClassVar[tuple[str, ...]] = ("target_dataset",)
    used_with: ClassVar[Uses] = {
        **TrainSpec.used_with,
        "contrastive_weight": {"objective": {"contrastive"}},
        "head_dim": {"objective": {"contrastive"}},
        "num_patches": {"objective": {"contrastive"}},
        "temperature": {"objective": {"contrastive"}},
        "cycle_weight": {"objective": {"cycle"}},
    }
    architecture: ClassVar[frozenset[str]] = frozenset({
        "preset", "objective", "base_channels", "num_blocks", "critic_layers", "head_dim",
    })  # fmt: skip

    family: Literal["translation"]
    target_dataset: DatasetId
    """The look to learn: images of the same size and number of channels as those of ``dataset``, without pairs."""
    preset: Literal["xs", "s", "b"] = "xs"
    """Size of the network where the fields below leave it open: from two CPU cores to one GPU."""
    objective: Objective = "cycle"
    """What holds an image to its source: that a second network finds the way back (CycleGAN, Zhu et al., 2017), or that
    each place is recognised among others of the same image (CUT, Park et al., 2020). Of the first both directions can
    be asked; the second trains one, with half as many networks."""
    base_channels: int = Field(default=8, ge=4, le=512)
    """Channels at the image's own resolution, doubled at each of up to two halvings."""
    num_blocks: int = Field(default=2, ge=1, le=32)
    """Residual blocks at the lowest resolution."""
    critic_layers: int = Field(default=3, ge=1, le=6)
    """Strided layers of the discriminator, fewer on small images; 3 of them judge patches of 70 x 70 pixels."""
    contrastive_weight: float = Field(default=1.0, ge=0, le=1e4)
    """Weight of PatchNCE between an image and its translation (``contrastive`` only)."""
    head_dim: int = Field(default=64, ge=4, le=1024)
    """Dimensions in which places are compared (``contrastive`` only)."""
    num_patches: int = Field(default=64, ge=2, le=4096)
    """Places of each image that are told apart (``contrastive`` only)."""
    temperature: float = Field(default=0.07, gt=0, le=10)
    """What the similarities of places are divided by (``contrastive`` only)."""
    cycle_weight: float = Field(default=10.0, ge=0, le=1e4)
    """Weight of the mean distance between an image and its way there and back (``cycle`` only)."""
    identity_weight: float = Field(default=5.0, ge=0, le=1e4)
    """Weight of the loss on an image that has the look already and should stay as it is."""
    batch_size: int = Field(default=16, ge=1, le=65_536)
    """Images of each dataset per optimizer step."""
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """Peak learning rate of AdamW, of both parts."""
    betas: Betas = (0.5, 0.999)
    """Decay of AdamW's averages of the gradient and of its square."""
    grad_clip: float = Field(default=1e6, gt=0, le=1e6)
    """Largest global gradient norm; the default is none, as in the papers."""

    @classmethod
    def derived(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        sizes = PRESETS.get(str(given.get("preset", "xs")), {})
        recipe = RECIPES["contrastive" if given.get("objective") == "contrastive" else "cycle"]
        return {**sizes, **recipe}

    @model_validator(mode="after")
    def _two_looks(self) -> "TranslationSpec":
        if self.target_dataset == self.dataset:
            raise wrong("target_dataset", "target_dataset must be another dataset than dataset")
        return self

    @property
    def knows_both_ways(self) -> bool:
        """Whether the model can also translate from the target's look to the source's."""
        return self.objective == "cycle"

    def scores_on(self, data: Mapping[str, Any], info: Mapping[str, Any]) -> frozenset[str]:
        """The error of the way there and back, where both are known."""
        return frozenset({"cycle_error"} if self.knows_both_ways else ())

    def check_data(self, infos: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse, beside what any family refuses, images without a map that could be worked at."""
        super().check_data(infos)
        side = min(infos["dataset"]["shape"][1:])
        if side < SMALLEST_SIDE:
            raise wrong("dataset", f"images have sides of at least {SMALLEST_SIDE} pixels, not {side}")

    def check_task(self, request: Request, info: Mapping[str, Any]) -> None:
        super().check_task(request, info)
        if isinstance(request, Translate) and request.direction == "to_source" and not self.knows_both_ways:
            raise wrong("direction", "the model knows one direction; the objective cycle trains both")
