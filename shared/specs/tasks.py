"""What may be asked of a trained model, whatever its family."""

from typing import Annotated, Literal

from pydantic import Field

from shared.specs.spec import DatasetId, ModelRef, Seed, Spec


class _Task(Spec):
    model: ModelRef
    """The model version to use."""
    seed: Seed = 0
    """Key of the noise: sample ``index`` of a seed is the same whatever else is drawn with it."""


class Generate(_Task):
    """Draw new samples."""

    task: Literal["generate"]
    num_samples: int = Field(default=16, ge=1, le=4096)
    """How many samples to draw."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Standard deviation of the prior that is drawn from; 1 is the model's own."""


class Reconstruct(_Task):
    """Encode samples of a dataset and decode them again."""

    task: Literal["reconstruct"]
    dataset: DatasetId
    """Where the inputs come from."""
    split: Literal["train", "held_out"] = "held_out"
    """Which part of the dataset."""
    num_samples: int = Field(default=16, ge=1, le=4096)
    """How many of its first samples."""


class Interpolate(_Task):
    """Walk between pairs of random latents along the great circle (slerp)."""

    task: Literal["interpolate"]
    num_pairs: int = Field(default=4, ge=1, le=256)
    """How many pairs of end points."""
    num_points: int = Field(default=8, ge=2, le=64)
    """Samples along each path, end points included."""


GenerateSpec = Annotated[Generate | Reconstruct | Interpolate, Field(discriminator="task")]
