"""Where objects lie. A key names the attempt that wrote it, or the dataset that was uploaded; no other is ours.

So whether an object can still become part of something follows from its key and the job's row.
"""

import re
from dataclasses import dataclass
from typing import Final
from uuid import UUID

PREFIXES: Final = ("datasets/", "jobs/")
"""In the order in which a listing of the whole bucket shows them."""

_ARTIFACT: Final = re.compile(r"jobs/job_([0-9a-f]{32})/([1-9][0-9]{0,17})/.+", re.DOTALL)
_SOURCE: Final = re.compile(r"datasets/[0-9a-f]{32}/source")


@dataclass(frozen=True)
class Origin:
    """Who wrote an object: this attempt, or an upload if both are None."""

    job_id: UUID | None = None
    fence: int | None = None


def artifact_key(job_id: str, fence: int, name: str) -> str:
    """Where an attempt of the job with this public id puts what it publishes as ``name``."""
    return f"jobs/{job_id}/{fence}/{name}"


def source_key(dataset_id: UUID) -> str:
    """Where an uploaded dataset lies, as it came."""
    return f"datasets/{dataset_id.hex}/source"


def origin(key: str) -> Origin | None:
    """Who wrote the object under this key; None: not we."""
    if (found := _ARTIFACT.fullmatch(key)) is not None:
        return Origin(UUID(hex=found[1]), int(found[2]))
    return Origin() if _SOURCE.fullmatch(key) else None
