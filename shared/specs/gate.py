"""What a version of a model has to show before an alias is moved to it: bounds on the figures of evaluate jobs."""

from collections.abc import Mapping
from typing import Annotated, Final, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from shared.described import Described
from shared.specs.spec import DatasetId, Direction, JobId, Spec, wrong

BETTER: Final[Mapping[str, Direction]] = {
    **dict.fromkeys(("frechet_distance", "kernel_distance", "mind", "reconstruction_mse"), "lower"),
    **dict.fromkeys(("precision", "recall", "coverage", "psnr", "ssim", "class_accuracy"), "higher"),
    **dict.fromkeys(("nearer_to_train", "copying"), "lower"),
}
"""Which way the figures that any model can have are better, where one way always is."""

FigureName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
"""A key of ``figures`` in the result of an evaluate job."""


def _is_none(value: object) -> bool:
    """What says nothing is not shown."""
    return value is None


class Bound(Spec):
    """A bound on one figure: ``at_most``, ``at_least`` or ``no_worse_than_current``.

    A number is compared with the unfavourable end of the figure's 95 % confidence interval; two versions by their
    values.
    """

    metric: FigureName
    """The figure, as the result of an evaluate job names it (``docs/metrics.md``)."""
    at_most: float | None = Field(default=None, exclude_if=_is_none)
    """The upper end of the figure's interval must not lie above this."""
    at_least: float | None = Field(default=None, exclude_if=_is_none)
    """The lower end of the figure's interval must not lie below this."""
    no_worse_than_current: Literal[True] | None = Field(default=None, exclude_if=_is_none)
    """The value must be as good as that of the version which the alias stands for now, measured on the same reference
    in the same features with as many samples."""
    better: Direction | None = Field(default=None, exclude_if=_is_none)
    """Which way the figure is better (``no_worse_than_current`` of figures that only some families have)."""
    dataset: DatasetId | None = Field(default=None, exclude_if=_is_none)
    """Only evaluations on this dataset count; on any when left out."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(kind is not None for kind in (self.at_most, self.at_least, self.no_worse_than_current)) != 1:
            raise wrong("metric", "give one of at_most, at_least and no_worse_than_current")
        if self.better is not None and (self.no_worse_than_current is None or self.metric in BETTER):
            raise wrong("better", "this is for no_worse_than_current, where it is not known which way is better")
        if self.no_worse_than_current and self.better is None and self.metric not in BETTER:
            raise wrong("better", f"say which way {self.metric} is better: lower or higher")
        return self

    @property
    def direction(self) -> Direction:
        """Which way the figure is better; of a number, on which side of it the figure has to be."""
        if self.at_most is not None:
            return "lower"
        return "higher" if self.at_least is not None else self.better or BETTER[self.metric]


Gate = Annotated[list[Bound], Field(max_length=32)]
"""All of its bounds must hold; an empty one lets every version pass."""


class AliasRequest(Spec):
    """What an alias shall stand for, and by which gate it is moved."""

    version: int = Field(ge=1, lt=2**31)
    """A version of the model."""
    gate: Gate | None = None
    """Takes the place of the alias's gate; that stays as it is when left out."""
    evaluation: JobId | None = None
    """The evaluate job of the version that is looked at; for each bound the newest that measured it when left out."""


class Check(Described):
    """How a version stands to one bound of a gate."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    bound: Bound
    passed: bool
    reason: str
    evaluation: str | None = Field(default=None, exclude_if=_is_none)
    """The evaluate job that was looked at; None if none has measured the figure."""
    value: float | None = Field(default=None, exclude_if=_is_none)
    confidence_95: tuple[float | None, float | None] | None = Field(default=None, exclude_if=_is_none)
    current_value: float | None = Field(default=None, exclude_if=_is_none)
    """Of the version that the alias stands for, where the bound compares with it."""
    current_evaluation: str | None = Field(default=None, exclude_if=_is_none)
