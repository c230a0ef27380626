"""How a second run of a job compares with the first."""

from typing import Any

import pytest

from shared.reproduction import Original, Reproduction, compare

FINGERPRINT = {"torch": "2.13.0", "halved_at": [3], "device": "H200"}


def compared(*, sha256: str | None = "a", **fingerprints: Any) -> Reproduction:
    told = {"then": FINGERPRINT, "now": FINGERPRINT} | fingerprints
    original = Original(job_id="job_1", sha256="a", reproducibility="same_hardware", fingerprint=told["then"])
    return compare(original, sha256=sha256, fingerprint=told["now"])


@pytest.mark.parametrize(("sha256", "identical"), [("a", True), ("b", False), (None, False)])
def test_bytes_are_identical_or_not(sha256: str | None, identical: bool) -> None:
    found = compared(sha256=sha256)

    assert (found.identical, found.expected_sha256, found.found_sha256) == (identical, "a", sha256)


def test_every_part_of_the_fingerprint_that_differs_is_named() -> None:
    found = compared(now={"torch": "2.13.0", "halved_at": [], "tile": 8})

    assert (found.identical, found.same_fingerprint) == (True, False)
    assert {name: (one.expected, one.found) for name, one in found.differing.items()} == {
        "device": ("H200", None),
        "halved_at": ([3], []),
        "tile": (None, 8),
    }


@pytest.mark.parametrize("recorded", [{"then": None}, {"now": None}, {"then": None, "now": None}])
def test_runs_that_recorded_nothing_are_not_said_to_be_alike(recorded: dict[str, Any]) -> None:
    found = compared(**recorded)

    assert (found.same_fingerprint, found.differing) == (None, {})
