"""What every spec has in common: strict, immutable, finite. Knows no family."""

import re
from typing import Annotated, Any, Final, Literal, cast

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

from shared.described import Described


class Spec(Described):
    """What somebody asked for. Unknown fields and non-finite numbers are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _as_tuple(value: Any) -> Any:
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


FROM_LIST: Final = BeforeValidator(_as_tuple)
"""For fields that are tuples, in specs whose validators see JSON as Python's objects: strictly, a list is no tuple."""


def wrong(field: str, message: str) -> PydanticCustomError:
    """The error of a validator that looks at several fields: it names the one to change."""
    return PydanticCustomError("fields_do_not_fit", "{message}", {"field": field, "message": message})


Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""Key of every random number of a job; the same seed draws the same numbers on any worker."""

ArtifactId = Annotated[str, StringConstraints(pattern=r"^art_[0-9a-f]{32}$")]

JOB_ID: Final = re.compile(r"job_[0-9a-f]{32}")

JobId = Annotated[str, StringConstraints(pattern=f"^{JOB_ID.pattern}$")]

DatasetId = Annotated[str, StringConstraints(pattern=r"^ds_[0-9a-f]{32}$")]

PictureId = Annotated[str, StringConstraints(pattern=r"^(art|ds)_[0-9a-f]{32}$")]
"""A PNG that a job has made, or a dataset, of which one image is meant."""

ModelName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
"""Name of a registered model; each finished training adds a version to it."""


def _no_number(alias: str) -> str:
    if alias == "latest" or re.fullmatch(r"v[0-9]+", alias):
        raise ValueError(
            "an alias must not look like a version: the newest has the model's name alone, others a number"
        )
    return alias


AliasName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9._-]{0,62}$"), AfterValidator(_no_number)]
"""A name for a version of a model, which can be moved: ``production``."""

ModelRef = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}(@([1-9][0-9]{0,8}|[a-z][a-z0-9._-]{0,62}))?$"),
]
"""``name@version``, ``name@alias``, or ``name`` alone for the newest version; a job keeps the version that it meant at
submission. Or the id of a job, for the model that it makes: whoever names one that has not ended waits for it."""

Modality = Literal["image", "text", "audio"]
"""What a family learns from."""

DatasetKind = Literal[Modality, "model"]
"""What an upload may hold: samples, or a model of another library (``docs/decisions/0026-a-model-comes-in.md``)."""

Direction = Literal["lower", "higher"]
"""Which way a figure is better."""
