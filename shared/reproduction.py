"""A finished job that is run again: what the second run has to match, and whether it does. Pure: reads no SQL.

A job is known by one SHA-256 of all that it made, which its result tells: of a generate job over its samples, of a
training the weights, of an evaluation its report, of an ingestion the dataset's digest, of an export over its files.
"""

from typing import Any, Final, Literal

from pydantic import ConfigDict

from shared.described import Described

Reproducibility = Literal["exact", "same_hardware", "none"]
"""Where the same request makes the same bytes again, as a job's result says of itself."""
EXACT: Final[Reproducibility] = "exact"
"""On any machine: bytes are copied, or computed in whole numbers."""


class _Told(Described):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Original(_Told):
    """The job that is run again, as it was when that was asked for: it may be erased meanwhile."""

    job_id: str
    sha256: str
    """Of what it made."""
    reproducibility: Reproducibility | None = None
    """What it said of itself; after ``none`` other bytes are no fault."""
    fingerprint: dict[str, Any] | None = None
    """What else its last bits depended on."""


class Difference(_Told):
    """A part of the fingerprint that is not the same."""

    expected: Any
    found: Any


class Reproduction(_Told):
    """How a job compares with the one that it ran again."""

    of: str
    """The job that was run again."""
    identical: bool
    """Whether both made the same bytes."""
    expected_sha256: str
    found_sha256: str | None
    reproducibility: Reproducibility | None
    """What the first job said of itself."""
    same_fingerprint: bool | None
    """Whether both ran alike, as far as it is recorded; None if one of them recorded nothing."""
    differing: dict[str, Difference]
    """The parts of the fingerprint in which they did not."""


def compare(original: Original, *, sha256: str | None, fingerprint: dict[str, Any] | None) -> Reproduction:
    """How a job that made ``sha256`` compares with ``original``."""
    before, now = original.fingerprint or {}, fingerprint or {}
    differing = {
        name: Difference(expected=before.get(name), found=now.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }
    return Reproduction(
        of=original.job_id,
        identical=sha256 == original.sha256,
        expected_sha256=original.sha256,
        found_sha256=sha256,
        reproducibility=original.reproducibility,
        same_fingerprint=not differing if before and now else None,
        differing=differing if before and now else {},
    )
