"""Whether a version passes the gate of an alias, from what evaluate jobs measured. Pure: reads no SQL."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from shared.specs.gate import Bound, Check
from shared.specs.spec import Direction


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A measured number with what it takes to compare it, as the result of an evaluate job tells it."""

    value: float
    interval: tuple[float | None, float | None]
    """95 %; a bound that is not known is None."""
    num_samples: int
    features: str | None
    reference: str | None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        low, high = fields["confidence_95"]
        return cls(
            value=fields["value"],
            interval=(low, high),
            num_samples=fields["num_samples"],
            features=fields.get("features"),
            reference=fields.get("reference"),
        )

    def worst(self, direction: Direction) -> float | None:
        """The unfavourable end of the interval."""
        return self.interval[1 if direction == "lower" else 0]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A succeeded evaluate job."""

    id: str
    dataset: str
    split: str
    figures: Mapping[str, Figure]

    @classmethod
    def of(cls, job_id: str, spec: Mapping[str, Any], result: Mapping[str, Any] | None) -> Self:
        figures = {name: Figure.from_json(figure) for name, figure in (result or {}).get("figures", {}).items()}
        return cls(id=job_id, dataset=spec["dataset"], split=spec["split"], figures=figures)


class Measured(NamedTuple):
    """A figure, and who measured it."""

    figure: Figure
    evaluation: Evaluation

    def differs(self, other: "Measured") -> str | None:
        """Why the two are not comparable; None if they are."""
        here, there = self.conditions(), other.conditions()
        return next((f"the {what} differs" for what in here if here[what] != there[what]), None)

    def conditions(self) -> dict[str, Any]:
        """What must be the same of two figures for the better one to mean something."""
        figure, evaluation = self.figure, self.evaluation
        # Where no digest of the reference is told, dataset and split say what it was measured on.
        on = (figure.reference,) if figure.reference else (evaluation.dataset, evaluation.split)
        return {"reference": on, "feature network": figure.features, "number of samples": figure.num_samples}


def check(bound: Bound, evaluations: Sequence[Evaluation], current: Sequence[Evaluation] | None) -> Check:
    """How a version stands to ``bound``.

    Args:
        evaluations: of the version, newest first; the first that measured the figure is looked at.
        current: of the version that the alias stands for, newest first; None if it is new.
    """
    found = next(iter(_measured(bound, evaluations)), None)
    if found is None:
        return Check(bound=bound, passed=False, reason=_missing(bound, evaluations))
    passed, reason, other = _judge(bound, found, None if current is None else _measured(bound, current))
    return Check(
        bound=bound,
        passed=passed,
        reason=reason,
        evaluation=found.evaluation.id,
        value=found.figure.value,
        confidence_95=found.figure.interval,
        current_evaluation=None if other is None else other.evaluation.id,
        current_value=None if other is None else other.figure.value,
    )


class _Verdict(NamedTuple):
    passed: bool
    reason: str
    other: Measured | None = None
    """The figure of the current version that it was compared with."""


def _judge(bound: Bound, found: Measured, others: Sequence[Measured] | None) -> _Verdict:
    if bound.no_worse_than_current is None:
        return _within(bound, found)
    if others is None:
        return _Verdict(passed=True, reason="there is no version yet to compare with")
    return _no_worse(bound, found, others)


def _measured(bound: Bound, evaluations: Sequence[Evaluation]) -> list[Measured]:
    return [
        Measured(one.figures[bound.metric], one)
        for one in evaluations
        if bound.metric in one.figures and bound.dataset in (None, one.dataset)
    ]


def _missing(bound: Bound, evaluations: Sequence[Evaluation]) -> str:
    where = f" on {bound.dataset}" if bound.dataset else ""
    known = sorted({name for one in evaluations for name in one.figures})
    told = f"measured are {', '.join(known)}" if known else "evaluate it first"
    return f"no evaluation of the version has measured {bound.metric}{where}; {told}"


def _within(bound: Bound, found: Measured) -> _Verdict:
    value, worst = found.figure.value, found.figure.worst(bound.direction)
    is_upper = bound.at_most is not None
    limit = bound.at_most if is_upper else bound.at_least
    if limit is None or worst is None:
        few = found.figure.num_samples
        return _Verdict(passed=False, reason=f"{bound.metric} is {value:.6g}; how sure is not known of {few} samples")
    asked = f"{'at most' if is_upper else 'at least'} {limit:.6g} is asked"
    told = f"{bound.metric} is {value:.6g}, the {'upper' if is_upper else 'lower'} end of its interval {worst:.6g}"
    return _Verdict(passed=worst <= limit if is_upper else worst >= limit, reason=f"{told}; {asked}")


def _no_worse(bound: Bound, found: Measured, others: Sequence[Measured]) -> _Verdict:
    if not others:
        return _Verdict(passed=False, reason=f"no evaluation of the current version has measured {bound.metric}")
    other = next((one for one in others if found.differs(one) is None), None)
    if other is None:
        newest = others[0]
        reason = f"not comparable with {newest.evaluation.id} of the current version: {found.differs(newest)}"
        return _Verdict(passed=False, reason=reason)
    new, now = found.figure.value, other.figure.value
    passed = new <= now if bound.direction == "lower" else new >= now
    told = f"{bound.metric} is {new:.6g}, and {now:.6g} of the current version"
    return _Verdict(passed=passed, reason=f"{told}; {bound.direction} is better", other=other)
