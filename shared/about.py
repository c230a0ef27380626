"""What the server tells of itself: the families of models, the life of a job, and whether it can serve."""

from typing import Any, Literal

from shared.specs.spec import Modality
from shared.wire import JobStateName, View


class FamilyView(View):
    """A model family and what may be asked of it, as JSON Schema."""

    family: str
    modality: Modality
    tasks: list[str]
    """What ``spec.task`` of a generate job may be."""
    train: dict[str, Any]
    """Schema of the ``spec`` of a train job."""
    generate: dict[str, dict[str, Any]]
    """Schema of the ``spec`` of a generate job, by task."""


class JobStatesView(View):
    """The life of a job as data."""

    initial: JobStateName
    final: list[JobStateName]
    moves: dict[JobStateName, list[JobStateName]]
    """From each state, the states a job may move to."""


class ReadinessView(View):
    """Whether the API can serve."""

    status: Literal["ok", "degraded", "away"]
    """``degraded``: requests are served, and something will have to wait."""
    database: Literal["ok", "away"]
    broker: Literal["ok", "away"]
    storage: Literal["ok", "away"]
