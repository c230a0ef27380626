"""What may be asked of a trained model, whatever its family.

Some options mean something to some families only: each family lists those it understands (``TrainSpec.tasks``), and
the others must keep their defaults.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from shared.specs.spec import ArtifactId, DatasetId, ModelRef, PictureId, Seed, Spec, wrong

Solver = Literal["euler", "heun", "ddim", "ddpm", "dpmpp_2m"]
"""How a diffusion model goes from noise to data: Euler and Heun (Karras et al., 2022), DDIM (Song et al., 2020),
ancestral DDPM (Ho et al., 2020), DPM-Solver++(2M) (Lu et al., 2022)."""

Levels = Literal["karras", "uniform"]
"""At which noise levels a solver evaluates the network: those of Karras et al. (2022, equation 5), or those at equal
steps of the objective's own time."""

Precision = Literal["auto", "fp32", "bf16"]


def _ascending(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] >= interval[1]:
        raise ValueError("the first noise level must be below the second")
    return interval


def _not_empty(box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    left, top, right, bottom = box
    if left >= right or top >= bottom:
        raise ValueError("left must be below right, and top below bottom")
    return box


Side = Annotated[int, Field(ge=0, le=4096)]
Labels = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=4096)]
"""Classes; sample ``i`` has ``labels[i % len(labels)]``."""
NoiseInterval = Annotated[
    tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]], AfterValidator(_ascending)
]
"""A lower and an upper noise level (sigma), in units of the data's own scale of about 1."""

OPTIONS: Final = frozenset({
    "labels", "steps", "solver", "schedule", "guidance_scale", "guidance_interval", "temperature", "eta",
})  # fmt: skip
"""Fields that a family has to list to understand them."""

PictureField = Literal["mask", "style"]
"""Fields that name a picture beside a task's inputs."""


Box = Annotated[tuple[Side, Side, Side, Side], AfterValidator(_not_empty)]


class _Task(Spec):
    model: ModelRef
    """The model version to use."""
    seed: Seed = 0
    """Key of the noise: sample ``index`` of a seed is the same whatever else is drawn with it."""
    precision: Precision = "fp32"
    """What the network computes in; ``auto`` is bf16 where the device multiplies it in hardware. Networks of
    ``diffusion`` and ``consistency`` know bf16; other families, and all else of a sampler, stay in fp32, and the recipe
    says in which it was."""
    determinism: Literal["exact", "relaxed"] = "exact"
    """``exact``: the bytes do not depend on what else is drawn at the same time. ``relaxed``: they may, in their last
    bits, and no time is spent on slots that nobody uses."""
    compiled: bool = Field(default=False, exclude_if=lambda compiled: not compiled)
    """Compute the network's repeated blocks by code that is compiled meanwhile, once it is ready (``relaxed`` only: it
    has other last bits, from a step on that is chance)."""
    captured: bool = Field(default=False, exclude_if=lambda captured: not captured)
    """Record the kernels of a call of the network once, as a CUDA graph, and have the GPU repeat them: the same
    arithmetic, without the launch of each (``exact`` only: a tile's shape stays the same). Diffusion and consistency
    models on GPUs; all else is computed as usual, and the job's log says why."""

    @model_validator(mode="after")
    def _compiled_is_relaxed(self) -> Self:
        if self.compiled and self.determinism == "exact":
            raise wrong("compiled", "compiled code has other last bits: it needs determinism relaxed")
        return self

    @model_validator(mode="after")
    def _captured_is_exact(self) -> Self:
        if self.captured and self.determinism == "relaxed":
            raise wrong("captured", "what is drawn relaxed changes its shape from step to step: it cannot be captured")
        return self

    def options(self) -> dict[str, Any]:
        """Those of its fields that not every family understands."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in OPTIONS}


class Sampling(_Task):
    """Options of tasks that draw something."""

    labels: Labels | None = None
    """Class of each sample, repeated from the front when there are fewer than samples; a class-conditional model goes
    through its classes in order when left out."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    """Steps of the solver; the family's own number when left out."""
    solver: Solver | None = None
    """How the steps are done; the family's own choice when left out."""
    schedule: Levels = Field(default="karras", exclude_if=lambda schedule: schedule == "karras")
    """Noise levels between the highest and zero. ``uniform`` is for objectives that have a time: DDPM's timesteps,
    spaced as diffusers' ``trailing`` does, or rectified flow's t."""
    guidance_scale: float = Field(default=1.0, ge=0, le=100)
    """Strength of classifier-free guidance (Ho and Salimans, 2022); 1 is none."""
    guidance_interval: NoiseInterval | None = None
    """Noise levels at which guidance acts (Kynkäänniemi et al., 2024); all of them when left out."""
    preview_every: int | None = Field(default=None, ge=1)
    """Show what some of the samples are going to be after every so many steps, where the model can tell."""


class Generate(Sampling):
    """Draw new samples."""

    task: Literal["generate"]
    num_samples: int = Field(default=16, ge=1, le=4096)
    """How many samples to draw."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """Standard deviation of the prior that is drawn from, or what the logits of codes are divided by; 1 is the model's
    own."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """Fresh noise of ``ddim`` in each step: 0 is none, 1 is as much as ``ddpm`` adds."""


class _WithInputs(Sampling):
    """A task on images: those of a dataset, or some that jobs have made. A dataset may be a single uploaded picture."""

    picture: ClassVar[PictureField | None] = None
    """The field that names one more picture, which is for all of them."""

    dataset: DatasetId | None = None
    """Where the inputs come from; this or ``images``."""
    split: Literal["train", "held_out", "all"] = "held_out"
    """Which part of the dataset."""
    num_samples: int = Field(default=16, ge=1, le=4096)
    """How many of its first samples."""
    images: Annotated[list[ArtifactId], Field(min_length=1, max_length=256)] | None = None
    """PNG artifacts to use as inputs, one sample each."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.dataset is None) == (self.images is None):
            raise wrong("dataset", "the inputs come from a dataset or from images: give one of the two")
        return self

    def input_shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """The shapes (C, H, W) that inputs may have for a model of images of ``shape``.

        Raises:
            PydanticCustomError: as ``wrong`` makes it; the task cannot be done with such images.
        """
        return [tuple(shape)]

    def picture_shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """The shapes that the picture may have which ``picture`` tells of."""
        return [tuple(shape)]


class Reconstruct(_WithInputs):
    """Encode images and decode them again."""

    task: Literal["reconstruct"]


MOST_RESTORING_STEPS: Final = 1000
"""Of all passes of a restoration together."""
RESTORING_STEPS: Final = 25


class _Restoration(_WithInputs):
    """A task that completes images of which something is known."""

    average_of: int = Field(default=1, ge=1, le=64)
    """The result is the mean of so many draws, each with all ``steps``. One draw is sharp and one of many images that
    could be; the mean is softer, and nearer to the original: its mean square error is ``(1 + 1/n) / 2`` of that of one
    draw of the right distribution."""

    @model_validator(mode="after")
    def _few_steps(self) -> Self:
        steps = self.steps or RESTORING_STEPS
        if self.average_of * steps > MOST_RESTORING_STEPS:
            raise wrong(
                "average_of", f"{self.average_of} draws of {steps} steps are more than {MOST_RESTORING_STEPS} in all"
            )
        return self


class Inpaint(_Restoration):
    """Fill in a part of each image, keeping the rest as it is to the bit (Wang et al., 2022; Lugmayr et al., 2022)."""

    picture: ClassVar[PictureField | None] = "mask"

    task: Literal["inpaint"]
    box: Box | None = None
    """What to fill: left, top, right and bottom in pixels, the last two excluded; this or ``mask``."""
    mask: PictureId | None = None
    """What to fill: the bright pixels of this picture (an artifact, or the first image of a dataset)."""

    @model_validator(mode="after")
    def _one_mask(self) -> Self:
        if (self.box is None) == (self.mask is None):
            raise wrong("box", "what to fill is said by a box or by a mask: give one of the two")
        return self

    def picture_shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        return [(channels, *shape[1:]) for channels in (1, 3)]


class SuperResolve(_Restoration):
    """Enlarge images: the result, averaged over squares of ``factor`` pixels, is the input again."""

    task: Literal["super_resolve"]
    factor: Literal[2, 4, 8] = 4
    """How many times wider and higher the result is. Inputs of the model's own size are reduced first."""

    def input_shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        channels, height, width = shape
        if height % self.factor or width % self.factor:
            raise wrong("factor", f"the sides of the model's images, {height} and {width}, must be multiples of it")
        return [(channels, height // self.factor, width // self.factor), *super().input_shapes(shape)]


class Colourise(_Restoration):
    """Give colours to images: the grey of the result is the grey of the input, which may have colours itself."""

    task: Literal["colourise"]

    def input_shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        return [(1, *shape[1:]), *super().input_shapes(shape)]


class ImageToImage(_WithInputs):
    """Begin at a noisy version of each image instead of at noise (SDEdit, Meng et al., 2021)."""

    task: Literal["image_to_image"]
    strength: float = Field(default=0.6, gt=0, le=1)
    """Share of the steps that the image goes through, having been brought to the noise level that they begin at; 1
    keeps nothing of it, and is what ``generate`` draws from the same seed for the same labels."""


class Translate(_WithInputs):
    """Give images the look of another set of images, keeping what is on them (Zhu et al., 2017; Park et al., 2020)."""

    task: Literal["translate"]
    direction: Literal["to_target", "to_source"] = "to_target"
    """To the look of the training's ``target_dataset``, or back to that of its ``dataset`` where the model knows it."""


class _WithStyle(_WithInputs):
    """A task on images and the style of one picture."""

    picture: ClassVar[PictureField | None] = "style"

    style: PictureId
    """Whose style the images get: a PNG artifact, or an image of a dataset. It is as large as the model's images."""
    style_index: int = Field(default=0, ge=0)
    """Which image of the dataset, counted from 0 over both its parts."""

    @model_validator(mode="after")
    def _index_is_for_datasets(self) -> Self:
        if self.style_index and self.style.startswith("art_"):
            raise wrong(
                "style_index", "style_index tells apart the images of a dataset, and an artifact is one picture"
            )
        return self


class Stylise(_WithStyle):
    """Draw images in the style of a picture, by one pass through the decoder (AdaIN, Huang and Belongie, 2017)."""

    task: Literal["stylise"]
    strength: float = Field(default=1.0, ge=0, le=1)
    """How much of the style; 0 is a reconstruction of the image (alpha, equation 14 of the paper)."""


class MatchStyle(_WithStyle):
    """Change images step by step until the statistics of their features are those of a picture (Gatys et al., 2016).

    ``steps`` are of gradient descent, 100 when left out.
    """

    task: Literal["match_style"]
    style_weight: float = Field(default=10.0, ge=0, le=1e12)
    """Weight of the style (beta over alpha, equation 7 of the paper); 0 keeps the image."""
    learning_rate: float = Field(default=0.02, gt=0, le=1)
    """About how far a pixel goes in a step; black is 0, white is 1."""


class Interpolate(Sampling):
    """Walk between pairs of random latents along the great circle (slerp)."""

    task: Literal["interpolate"]
    num_pairs: int = Field(default=4, ge=1, le=256)
    """How many pairs of end points."""
    num_points: int = Field(default=8, ge=2, le=64)
    """Samples along each path, end points included."""


class Encode(_WithInputs):
    """Give the latents of images, as arrays: the mean of their posterior, their codes, or the noise they come from."""

    task: Literal["encode"]


class Traverse(_Task):
    """Move one latent dimension at a time, all others at zero: a row of the sheet for each."""

    task: Literal["traverse"]
    num_dimensions: int = Field(default=8, ge=1, le=1024)
    """How many of the latent's first dimensions."""
    num_points: int = Field(default=7, ge=2, le=64)
    """Samples of each, both ends included."""
    reach: float = Field(default=3.0, gt=0, le=100)
    """The ends are minus and plus this, in standard deviations of the prior."""


WithInputs = Reconstruct | Encode | Inpaint | SuperResolve | Colourise | ImageToImage | Translate | Stylise | MatchStyle
"""Tasks that read images."""

Request = Generate | Interpolate | Traverse | WithInputs
"""Every task."""

GenerateSpec = Annotated[Request, Field(discriminator="task")]
