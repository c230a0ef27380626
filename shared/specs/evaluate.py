"""What may be asked of the job that measures a trained model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import Field
from pydantic_core import PydanticCustomError

from shared.specs.spec import DatasetId, wrong
from shared.specs.tasks import Generate, Reconstruct, Request
from shared.specs.training import TrainSpec

Metric = Literal[
    "frechet_distance", "kernel_distance", "mind", "coverage", "diversity", "memorisation", "classes",
    "reconstruction", "scores",
]  # fmt: skip
"""What can be measured; ``docs/metrics.md`` says how."""

OF_SAMPLES: Final[frozenset[Metric]] = frozenset({
    "frechet_distance", "kernel_distance", "mind", "coverage", "diversity", "memorisation", "classes",
})  # fmt: skip
"""Those that look at samples: the model must be able to ``generate``."""

Features = Literal["digits", "dct", "pixels", "inception", "imagenet"]

CLASSIFIERS: Final[Mapping[Features, int]] = {"digits": 10}
"""Features that know classes, and how many."""

NUM_NEIGHBOURS: Final = 5
"""A ball of ``coverage`` reaches to so many neighbours of its own set."""

FEWEST: Final[Mapping[Metric, int]] = {
    "frechet_distance": 2, "kernel_distance": 2, "coverage": NUM_NEIGHBOURS + 1, "diversity": 2, "scores": 2,
}  # fmt: skip
"""Images of the split that a metric needs, where one is not enough: for a covariance, pairs, neighbours, variances.
Samples are more than that in any case."""


def usual_features(shape: Sequence[int]) -> Features:
    """In what images of ``shape`` are compared unless somebody says it."""
    return "digits" if tuple(shape) == (1, 28, 28) else "dct"


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
    """What to measure, refused where it cannot be; when left out, whatever this model can be measured by on this
    dataset."""
    features: Features | None = None
    """In what images are compared: a shipped classifier of digits, low frequencies, pixels, or FID's own network or a
    smaller one of photographs where the operator has put their weights. When left out, digits for grey images of 28x28
    and else dct."""
    batch_size: int = Field(default=64, ge=1, le=4096)
    """Images that go through a network at once when they are scored."""

    preview_every: None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """An evaluation shows no samples on the way."""
    compiled: Literal[False] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=False, exclude_if=lambda compiled: not compiled
    )
    """What an evaluation draws is not compiled."""

    def features_of(self, shape: Sequence[int]) -> Features:
        """In what images of ``shape`` are compared."""
        return self.features or usual_features(shape)

    def wanted(self, trained: TrainSpec, info: Mapping[str, Any], data: Mapping[str, Any]) -> frozenset[Metric]:
        """What is measured of a model of ``trained`` on a dataset; ``info`` tells of the data that it has learned from,
        ``data`` of the dataset (``shape``, ``num_classes``, and ``counts`` of each split where they are known).

        Raises:
            PydanticCustomError: as ``wrong`` makes it; a metric was asked for that this model or this dataset has not,
                or there is nothing to measure.
        """
        if _count(data, self.split) == 0:
            raise wrong("split", f"the dataset has no {self.split} images")
        lacking: dict[Metric, str | None] = {
            metric: next(self._lacks(metric, trained, info, data), None) for metric in _METRICS
        }
        if self.metrics is None:
            able = frozenset[Metric](metric for metric, lack in lacking.items() if lack is None)
            if not able:
                raise wrong("model", f"nothing can be measured of this model: {lacking['scores']}")
            return able
        for place, metric in enumerate(self.metrics):
            if lack := lacking[metric]:
                raise wrong(f"metrics/{place}", f"{metric} cannot be measured: {lack}")
        return frozenset(self.metrics)

    def _lacks(
        self, metric: Metric, trained: TrainSpec, info: Mapping[str, Any], data: Mapping[str, Any]
    ) -> Iterator[str]:
        """Why this cannot be measured of them."""
        if metric in OF_SAMPLES and not _can(trained, Generate(task="generate", model=self.model), info):
            yield "no samples can be drawn from this model"
        reconstruct = Reconstruct(task="reconstruct", model=self.model, dataset=self.dataset)
        if metric == "reconstruction" and not _can(trained, reconstruct, info):
            yield "this model does not reconstruct images"
        if metric == "scores" and not trained.scores_on(data, info):
            yield "this model says nothing of data"
        if metric == "classes":
            yield from self._lacks_classes(trained.num_classes(info), self.features_of(data["shape"]))
        if metric == "memorisation":
            yield from (f"the dataset has no {part} images" for part in _SPLITS if _count(data, part) == 0)
        fewest, count = FEWEST.get(metric, 1), _count(data, self.split)
        if count is not None and count < fewest:
            yield f"{fewest} {self.split} images are needed, and the dataset has {count}"

    def _lacks_classes(self, known: int, features: Features) -> Iterator[str]:
        if (told := CLASSIFIERS.get(features, 0)) < max(known, 1):
            yield f"the features {features} know {told or 'no'} classes" + (f", and the model {known}" if told else "")


_METRICS: Final[tuple[Metric, ...]] = get_args(Metric)
_SPLITS: Final = ("train", "held_out")


def _count(data: Mapping[str, Any], split: str) -> int | None:
    """Images of a split; None where nobody has told."""
    return data.get("counts", {}).get(split)


def _can(trained: TrainSpec, request: Request, info: Mapping[str, Any]) -> bool:
    """Whether the model can be asked that."""
    if request.task not in trained.tasks:
        return False
    try:
        trained.check_task(request, info)
    except PydanticCustomError:
        return False
    return True
