"""What the service knows about itself, as data: the life of a job, and the families of models."""

from collections.abc import Mapping
from functools import cache
from typing import Any, get_args

from fastapi import APIRouter, Depends

from api.paging import refuse_unknown_parameters
from api.routes.dependencies import AnyCaller
from shared.about import FamilyView, JobStatesView
from shared.jobs.state import MOVES, JobState
from shared.specs import FAMILIES, GenerateSpec, Spec
from shared.specs.tasks import OPTIONS
from shared.wire import Page

router = APIRouter(prefix="/v1", tags=["meta"], dependencies=[Depends(refuse_unknown_parameters)])

_TASKS: Mapping[str, type[Spec]] = {
    get_args(kind.model_fields["task"].annotation)[0]: kind for kind in get_args(get_args(GenerateSpec)[0])
}
"""Task to the spec that asks for it, as the union of generate specs has them."""


@router.get("/meta/job-states", operation_id="getJobStates")
async def get_job_states(caller: AnyCaller) -> JobStatesView:  # noqa: ARG001
    """The states of a job, and which moves between them are legal."""
    order = list(JobState)
    return JobStatesView(
        initial=JobState.QUEUED.value,
        final=[state.value for state in order if state.is_final],
        moves={state.value: [to.value for to in order if to in MOVES[state]] for state in order},
    )


@router.get("/families", operation_id="listFamilies")
async def list_families(caller: AnyCaller) -> Page[FamilyView]:  # noqa: ARG001
    """The families of models, with the JSON Schema of what may be asked of each."""
    return Page(data=_families())


@cache
def _families() -> list[FamilyView]:
    return [
        FamilyView(
            family=name,
            modality=spec.modality,
            tasks=sorted(spec.tasks),
            train=spec.model_json_schema(),
            generate={task: _schema(_TASKS[task], understood) for task, understood in sorted(spec.tasks.items())},
        )
        for name, spec in FAMILIES.items()
    ]


def _schema(task: type[Spec], understood: frozenset[str]) -> dict[str, Any]:
    """The task's JSON Schema without the options that would be refused."""
    schema = task.model_json_schema()
    for name in OPTIONS - understood:
        schema["properties"].pop(name, None)
    return schema
