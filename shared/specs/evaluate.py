"""What may be asked of the job that measures a trained model."""

from collections.abc import Collection
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from shared.specs.spec import DatasetId, wrong
from shared.specs.tasks import Generate

Metric = Literal[
    "frechet_distance", "kernel_distance", "mind", "coverage", "diversity", "memorisation", "classes",
    "reconstruction", "scores",
]  # fmt: skip
"""What can be measured; ``docs/metrics.md`` says how."""

OF_SAMPLES: Final[frozenset[Metric]] = frozenset({
    "frechet_distance", "kernel_distance", "mind", "coverage", "diversity", "memorisation", "classes",
})  # fmt: skip
"""Those that look at samples: the model must be able to ``generate``."""


class EvaluateSpec(Generate):
    """Draw samples as a generate job does, and measure them and the model on a dataset."""

    task: Literal["generate"] = "generate"
    """How the samples are drawn."""
    num_samples: int = Field(default=1000, ge=16, le=4096)
    """How many samples to draw; the first so many images of the split are scored and reconstructed."""
    dataset: DatasetId
    """What the model is measured on; memorisation is looked for in its training images."""
    split: Literal["train", "held_out"] = "held_out"
    """The part that samples are compared to, and that is scored and reconstructed."""
    num_reference: int = Field(default=2000, ge=16, le=10_000)
    """Most images of the split that samples are compared to, evenly spread."""
    metrics: Annotated[list[Metric], Field(min_length=1)] | None = None
    """What to measure; whatever the model can be measured by when left out."""
    features: Literal["digits", "dct", "pixels", "inception"] | None = None
    """In what images are compared: a shipped classifier of digits, low frequencies, pixels, or FID's own network where
    the operator has put its weights. When left out, digits for grey images of 28x28 and else dct."""
    batch_size: int = Field(default=64, ge=1, le=4096)
    """Images that go through a network at once when they are scored."""

    preview_every: None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """An evaluation shows no samples on the way."""

    @model_validator(mode="after")
    def _classes_need_a_classifier(self) -> Self:
        if not self.knows_classes and "classes" in (self.metrics or []):
            raise wrong("metrics", f"the features {self.features} know no classes")
        return self

    @property
    def knows_classes(self) -> bool:
        """Whether the features may be those of a classifier."""
        return self.features in (None, "digits")

    def wanted(self, tasks: Collection[str]) -> frozenset[Metric]:
        """What is measured of a model that can do ``tasks``.

        Raises:
            PydanticCustomError: a metric was asked for that needs a task which the model cannot do.
        """
        able = frozenset[Metric]({"scores"})
        able |= OF_SAMPLES if "generate" in tasks else frozenset()
        able |= frozenset[Metric]({"reconstruction"} if "reconstruct" in tasks else ())
        if self.metrics is None:
            return able if self.knows_classes else able - {"classes"}
        for metric in self.metrics:
            if metric not in able:
                raise wrong("metrics", f"{metric} cannot be measured of this model")
        return frozenset(self.metrics)
