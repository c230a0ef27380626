"""What may be asked of a consistency model: a diffusion model tuned to need one to four steps (arXiv 2406.14548)."""

from collections.abc import Hashable, Mapping
from math import ceil
from typing import Any, ClassVar, Literal

from pydantic import Field

from shared.specs.noising import DDPM
from shared.specs.spec import Direction, Modality, ModelRef, wrong
from shared.specs.tasks import Request
from shared.specs.training import Betas, Trained, TrainSpec

MOST_STEPS = 4


class ConsistencySpec(TrainSpec):
    """Tune a trained diffusion model so that ``D(x; sigma)`` is the end of the path through ``x``, not its mean."""

    modality: ClassVar[Modality] = "image"
    tasks: ClassVar[Mapping[str, frozenset[str]]] = {"generate": frozenset({"labels", "steps"})}
    starts_from: ClassVar[frozenset[str]] = frozenset({"diffusion"})

    family: Literal["consistency"]
    init_from: ModelRef  # pyright: ignore[reportGeneralTypeIssues, reportIncompatibleVariableOverride]
    """The diffusion model to tune, of any objective but ``x0``, and of ``eps`` with other betas than
    ``squaredcos_cap_v2``."""
    stages: int = Field(default=8, ge=1, le=16)
    """How often the distance between two noise levels that must agree is divided by ``shrink``, at equal intervals."""
    shrink: float = Field(default=2.0, gt=1, le=256)
    """By how much it is divided; the first stage begins with ``1 / shrink`` of the way to zero."""
    huber: float = Field(default=0.03, ge=0, le=10)
    """The error, as a root mean square over the image, above which the loss is linear; 0 squares all errors."""
    noise_mean: float = Field(default=-1.1, ge=-10, le=10)
    """Mean of ``ln sigma`` in training."""
    noise_std: float = Field(default=2.0, gt=0, le=10)
    """Standard deviation of ``ln sigma`` in training."""
    second_level: float = Field(default=0.82, gt=0, le=80)
    """Noise level to which the first estimate is brought back for the second step; further ones halve it."""
    learning_rate: float = Field(default=1e-4, gt=0, le=1)
    betas: Betas = (0.9, 0.99)

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
        """Whichever network of a diffusion model ``init_from`` names does."""
        return True

    def stage_at(self, step: int) -> int:
        """The stage that ``step`` is in, counted from 1."""
        return ceil((step + 1) * self.stages / self.steps)

    def decided_by(self, step: int) -> Hashable:
        return self.stage_at(step)

    def compared_by(self) -> Mapping[str, Direction]:
        """The loss of the first stage, which every state is measured by, and its error."""
        return {"loss": "lower", "disagreement": "lower"}

    def check_references(self, models: Mapping[str, Trained], info: Mapping[str, Any]) -> None:
        """Refuse a diffusion model that cannot be tuned, or that does not know the classes of the data."""
        super().check_references(models, info)
        origin, num_classes = models["init_from"], info.get("num_classes", 0)
        if getattr(origin.spec, "autoencoder", None) is not None:
            raise wrong("init_from", "a model that works in latents cannot be tuned, only one that works in pixels")
        if getattr(origin.spec, "objective", None) == "x0":
            raise wrong("init_from", "a model of the objective x0 cannot be tuned: it does not end in its input")
        process = getattr(origin.spec, "process", DDPM)
        if getattr(origin.spec, "objective", None) == "eps" and process.beta_schedule == "squaredcos_cap_v2":
            known = "at its last time, of squaredcos_cap_v2, no image can be told from the noise that eps estimates"
            raise wrong("init_from", f"the model cannot be tuned: {known}")
        if (known := origin.num_classes) and not 0 < num_classes <= known:
            told = f"has {num_classes}" if num_classes else "has none"
            raise wrong("dataset", f"the model that init_from names knows {known} classes, and the dataset {told}")

    def num_classes(self, info: Mapping[str, Any]) -> int:
        """Those of the data that the diffusion model knows."""
        origin = info["models"]["init_from"]
        if not origin["spec"].get("class_conditional", True):
            return 0
        return min(info.get("num_classes", 0), origin["info"].get("num_classes", 0))

    def check_task(self, request: Request, info: Mapping[str, Any]) -> None:
        """Refuse, beside what any family refuses, more than four steps."""
        super().check_task(request, info)
        steps = request.options().get("steps")
        if steps is not None and steps > MOST_STEPS:
            raise wrong("steps", f"a consistency model takes at most {MOST_STEPS} steps")
