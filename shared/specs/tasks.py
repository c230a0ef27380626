"""What may be asked of a trained model, whatever its family.

Some options mean something to some families only: each family lists those it understands (``TrainSpec.tasks``), and
the others must keep their defaults.
"""

from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field

from shared.specs.spec import DatasetId, ModelRef, Seed, Spec

Solver = Literal["euler", "heun", "ddim", "ddpm", "dpmpp_2m"]
"""How a diffusion model goes from noise to data: Euler and Heun (Karras et al., 2022), DDIM (Song et al., 2020),
ancestral DDPM (Ho et al., 2020), DPM-Solver++(2M) (Lu et al., 2022)."""


def _ascending(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] >= interval[1]:
        raise ValueError("the first noise level must be below the second")
    return interval


Labels = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=4096)]
"""Classes; sample ``i`` has ``labels[i % len(labels)]``."""
NoiseInterval = Annotated[
    tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]], AfterValidator(_ascending)
]
"""A lower and an upper noise level (sigma), in units of the data's own scale of about 1."""

OPTIONS: Final = frozenset({
    "labels", "steps", "solver", "guidance_scale", "guidance_interval", "temperature", "eta",
})  # fmt: skip
"""Fields that a family has to list to understand them."""


class _Task(Spec):
    model: ModelRef
    """The model version to use."""
    seed: Seed = 0
    """Key of the noise: sample ``index`` of a seed is the same whatever else is drawn with it."""

    def options(self) -> dict[str, Any]:
        """Those of its fields that not every family understands."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in OPTIONS}


class _Sampling(_Task):
    """Options of tasks that draw something."""

    labels: Labels | None = None
    """Class of each sample, repeated from the front when there are fewer than samples; a class-conditional model goes
    through its classes in order when left out."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Steps of the solver; the family's own number when left out."""
    solver: Solver | None = None
    """How the steps are done; the family's own choice when left out."""
    guidance_scale: float = Field(default=1.0, ge=0, le=100)
    """Strength of classifier-free guidance (Ho and Salimans, 2022); 1 is none."""
    guidance_interval: NoiseInterval | None = None
    """Noise levels at which guidance acts (Kynkäänniemi et al., 2024); all of them when left out."""


class Generate(_Sampling):
    """Draw new samples."""

    task: Literal["generate"]
    num_samples: int = Field(default=16, ge=1, le=4096)
    """How many samples to draw."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Standard deviation of the prior that is drawn from; 1 is the model's own."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Fresh noise of ``ddim`` in each step: 0 is none, 1 is as much as ``ddpm`` adds."""


class Reconstruct(_Task):
    """Encode samples of a dataset and decode them again."""

    task: Literal["reconstruct"]
    dataset: DatasetId
    """Where the inputs come from."""
    split: Literal["train", "held_out"] = "held_out"
    """Which part of the dataset."""
    num_samples: int = Field(default=16, ge=1, le=4096)
    """How many of its first samples."""


class Interpolate(_Sampling):
    """Walk between pairs of random latents along the great circle (slerp)."""

    task: Literal["interpolate"]
    num_pairs: int = Field(default=4, ge=1, le=256)
    """How many pairs of end points."""
    num_points: int = Field(default=8, ge=2, le=64)
    """Samples along each path, end points included."""


GenerateSpec = Annotated[Generate | Reconstruct | Interpolate, Field(discriminator="task")]

Request = Generate | Reconstruct | Interpolate
"""What ``GenerateSpec`` validates to."""
