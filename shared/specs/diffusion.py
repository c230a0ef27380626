"""What may be asked of a diffusion model (Ho et al., 2020; Karras et al., 2022, arXiv 2206.00364)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal

from pydantic import Field, model_validator

from shared.specs import diffusers_folder
from shared.specs.export import ExportSpec
from shared.specs.imports import ImportSpec
from shared.specs.noising import DDPM, Objective, Process
from shared.specs.spec import Direction, Modality, ModelRef, wrong
from shared.specs.tasks import (
    RESTORING_STEPS,
    Colourise,
    Generate,
    ImageToImage,
    Inpaint,
    Interpolate,
    Request,
    Sampling,
    Solver,
    SuperResolve,
)
from shared.specs.training import Betas, Trained, TrainSpec, Uses
from shared.specs.unet import UNETS

SAMPLING: Final = frozenset({"labels", "steps", "solver", "schedule", "guidance_scale", "guidance_interval"})

EDITING: Final = SAMPLING - {"solver"}

DEFAULT_SOLVER: Final[Solver] = "heun"
DEFAULT_STEPS: Final[Mapping[Solver, int]] = {"euler": 50, "heun": 18, "ddim": 50, "ddpm": 250, "dpmpp_2m": 20}


def plan_of(request: Sampling) -> tuple[Solver, int]:
    """The solver and its number of steps."""
    solver = request.solver or DEFAULT_SOLVER
    return solver, request.steps or DEFAULT_STEPS[solver]


def num_steps(request: Sampling) -> int:
    """How many noise levels there are above zero."""
    if isinstance(request, Inpaint | SuperResolve | Colourise):
        return request.steps or RESTORING_STEPS
    return plan_of(request)[1]


def steps_down(request: ImageToImage) -> int:
    """How many of the steps, the last ones, an image goes through."""
    return round(plan_of(request)[1] * request.strength)


class DiffusionSpec(TrainSpec):
    """Train a denoiser ``D(x; sigma)`` of images in [-1, 1]; sigma is the noise's standard deviation."""

    modality: ClassVar[Modality] = "image"
    built_on: ClassVar[Mapping[str, frozenset[str]]] = {"autoencoder": frozenset({"vae", "vq"})}
    tasks: ClassVar[Mapping[str, frozenset[str]]] = {
        "generate": SAMPLING | {"eta"},
        "interpolate": SAMPLING,
        "reconstruct": frozenset(),
        "encode": frozenset(),
        "inpaint": EDITING,
        "super_resolve": EDITING,
        "colourise": EDITING,
        "image_to_image": SAMPLING,
    }
    exports: ClassVar[frozenset[str]] = frozenset({"diffusers"})
    imports: ClassVar[frozenset[str]] = frozenset({"diffusers"})
    used_with: ClassVar[Uses] = {
        **TrainSpec.used_with,
        "patch_size": {"network": {"dit"}},
        "sigma_data": {"objective": {"edm"}},
        "process": {"objective": {"eps", "v", "x0"}},
        "noise_mean": {"objective": {"edm", "flow"}},
        "noise_std": {"objective": {"edm", "flow"}},
        "label_dropout": {"class_conditional": {True}},
    }
    architecture: ClassVar[frozenset[str]] = frozenset({
        "network", "preset", "patch_size", "autoencoder", "objective", "sigma_data", "process",
        "class_conditional",
    })  # fmt: skip

    family: Literal["diffusion"]
    network: Literal["unet", "dit"] = "unet"
    """The convolutional UNet of DDPM, or the diffusion transformer (Peebles and Xie, 2022); latents that are vectors,
    as of a ``vae``, are always one token of the latter."""
    preset: Literal["xs", "s", "b"] = "xs"
    """Size: ``xs`` for minutes on a CPU, ``s`` (6.5 million parameters as a UNet) for 28 to 32 pixels, ``b`` for a
    large GPU; the UNet's ``b`` has the layout of DDPM on CIFAR-10."""
    patch_size: int | None = Field(default=None, ge=1, le=32)
    """Pixels of a token's side; 4 when left out, and 1 in latents (``dit`` only)."""
    autoencoder: ModelRef | None = None
    """A trained ``vae`` or ``vq`` in whose latents the model works, instead of in pixels (Rombach et al., 2022). It
    becomes a part of the model and stays as it is."""
    objective: Objective = "edm"
    """What the network predicts: EDM's preconditioned mixture; the noise, velocity or image of DDPM's process; or the
    direction of rectified flow."""
    sigma_data: float = Field(default=0.5, gt=0, le=10)
    """Standard deviation of the data, whose grey levels are in [-1, 1]; latents are brought to it (``edm`` only)."""
    process: Process = Field(default=DDPM, exclude_if=lambda process: process == DDPM)
    """How images become noise, of ``eps``, ``v`` and ``x0``; the linear one of DDPM when left out."""
    noise_mean: float | None = Field(default=None, ge=-10, le=10)
    """Mean of ``ln sigma`` in training; when left out -1.2 for ``edm`` and 0 for ``flow`` (the logit of its time). The
    other objectives train at those of ``process``."""
    noise_std: float | None = Field(default=None, gt=0, le=10)
    """Standard deviation of ``ln sigma`` in training; when left out 1.2 for ``edm`` and 1 for ``flow``."""
    class_conditional: bool = True
    """Learn the classes, where the dataset has some, so that a class can be asked for."""
    label_dropout: float = Field(default=0.1, ge=0, le=1)
    """Share of the samples that are shown without their class, which guidance needs."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the features that are dropped in each block while training; 0.1 for small datasets."""
    augment: float = Field(default=0.0, ge=0, le=1)
    """Probability of each of six ways to turn, flip, scale, stretch or move a training image (EDM, appendix F.2). The
    network is told how, and draws images as they are; 0.12 in the paper, for some tens of thousands of images."""
    betas: Betas = (0.9, 0.99)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)

    @property
    def nhwc_on_cpu(self) -> bool:
        return True

    @property
    def has_blocks(self) -> bool:
        return True

    @property
    def repeats_blocks(self) -> bool:
        return True

    @property
    def computes_in_type_of_weights(self) -> bool:
        """Both networks do; the autoencoder does not."""
        return True

    @property
    def couples_samples(self) -> bool:
        """Latents are scaled by what the first batch of them is."""
        return self.autoencoder is not None

    def compared_by(self) -> Mapping[str, Direction]:
        """The loss, and the error of the denoised image."""
        return {"loss": "lower", "denoising_error": "lower"}

    def scores_on(self, data: Mapping[str, Any], info: Mapping[str, Any]) -> frozenset[str]:
        """Bits per dimension of a model of pixels, of images without their classes, too."""
        without_classes = self.label_dropout > 0 or not self.num_classes(info)
        return frozenset({"bits_per_dim"} if self.autoencoder is None and without_classes else ())

    @model_validator(mode="after")
    def _only_images_are_augmented(self) -> "DiffusionSpec":
        if self.augment and self.autoencoder is not None:
            raise wrong("augment", "latents do not turn and move as their images do: augment needs a model of pixels")
        return self

    def check_references(self, models: Mapping[str, Trained], info: Mapping[str, Any]) -> None:
        """Refuse, beside what any family refuses, latents that are maps of several sizes, and to go on else augmented
        than ``init_from``."""
        if "autoencoder" in models and getattr(models["autoencoder"].spec, "network", None) == "ladder":
            raise wrong("autoencoder", "the latents of a ladder are maps of several sizes: name another model")
        super().check_references(models, info)
        if "init_from" not in models or not isinstance(origin := models["init_from"].spec, DiffusionSpec):
            return
        if bool(origin.augment) != bool(self.augment):
            known = "was" if origin.augment else "was not"
            raise wrong("augment", f"the model that init_from names {known} told of augmentation: so must this one be")

    def check_task(self, request: Request, info: Mapping[str, Any]) -> None:
        """Refuse, beside what any family refuses, options without effect and those that need what was not learnt."""
        super().check_task(request, info)
        if isinstance(request, Generate) and request.eta and request.solver != "ddim":
            raise wrong("eta", "eta is an option of the solver ddim")
        if isinstance(request, Interpolate) and request.solver == "ddpm":
            raise wrong("solver", "ddpm adds noise in each step, which no path between two samples survives")
        if isinstance(request, Colourise) and info["shape"][0] == 1:
            raise wrong("task", "the model's images have no colours")
        if isinstance(request, Inpaint | SuperResolve | Colourise) and self.autoencoder is not None:
            raise wrong("task", "the model works in latents, and what is known of an image is known of its pixels")
        if isinstance(request, ImageToImage) and not steps_down(request):
            raise wrong("strength", f"{request.strength} of {plan_of(request)[1]} steps is less than half a step")
        if isinstance(request, Sampling):
            self._check_schedule(request)
            self._check_guidance(request, info)

    def _check_schedule(self, request: Sampling) -> None:
        if request.schedule == "uniform" and self.objective == "edm":
            raise wrong("schedule", "edm has noise levels and no time: uniform is for eps, v, x0 and flow")
        steps, times = num_steps(request), self.process.num_train_timesteps
        if request.schedule == "uniform" and self.objective != "flow" and steps > times:
            raise wrong("steps", f"the model has {times} times, between which {steps} steps of uniform find none")

    def check_export(self, export: ExportSpec, info: Mapping[str, Any]) -> None:
        """Refuse, beside what any family refuses, what ``UNet2DModel`` has no words for."""
        super().check_export(export, info)
        if self.autoencoder is not None:
            raise wrong(
                "model", "the model works in latents, of which UNet2DModel does not know how images become them"
            )
        if self.network != "unet":
            raise wrong("model", f"the model is a {self.network}, and UNet2DModel is a UNet")
        layout = UNETS[self.preset]
        if layout.patch_size > 1:
            raise wrong("model", f"the preset {self.preset} sees squares of pixels as one, and UNet2DModel does not")
        height, width = info["shape"][1:]
        if height % layout.multiple or width % layout.multiple:
            known = f"images whose sides are multiples of {layout.multiple}, and here they are {width} by {height}"
            raise wrong("model", f"UNet2DModel pads nothing: with the preset {self.preset} it takes {known}")

    @classmethod
    def imported(cls, wanted: ImportSpec, files: Mapping[str, Any]) -> Trained:
        """A UNet of diffusers, of one of our layouts."""
        fields, info = diffusers_folder.fields_of(wanted, files)
        named = {"family": "diffusion", "dataset": wanted.dataset, "model": wanted.model}
        return Trained(spec=cls.model_validate(named | fields), info=info)

    def _check_guidance(self, request: Sampling, info: Mapping[str, Any]) -> None:
        if request.guidance_scale == 1:
            if request.guidance_interval is not None:
                raise wrong("guidance_interval", "without a guidance_scale there is no guidance")
        elif not (self.class_conditional and info.get("num_classes")):
            raise wrong("guidance_scale", "guidance needs a model of classes")
        elif self.label_dropout == 0:
            raise wrong("guidance_scale", "guidance needs a model that was trained with label_dropout")
