"""Bad samples among good ones: named, counted, and tolerated up to a share."""

from dataclasses import dataclass, field
from typing import Any, Final

from shared.errors import DatasetInvalid
from worker.data.members import shown

MAX_BAD_SHARE: Final = 0.01
"""A dataset of which more than this share cannot be read is refused as a whole."""
MAX_LISTED: Final = 20
MAX_NAMED: Final = 3


class BadSample(Exception):
    """One sample cannot be read; the message says why."""


@dataclass(kw_only=True)
class Rejects:
    """The bad samples of one dataset."""

    num_samples: int
    """Good and bad ones together."""
    noun: str
    """What a sample is, in the plural: ``images``, ``recordings``."""
    count: int = 0
    files: list[dict[str, str]] = field(default_factory=list)
    """Names and reasons of the first bad samples."""

    def add(self, name: str, reason: str) -> None:
        """Take note of a bad sample.

        Raises:
            DatasetInvalid: that is one too many.
        """
        self.count += 1
        reason = reason.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
        if len(self.files) < MAX_LISTED:
            self.files.append({"name": name, "reason": reason})
        if self.count > MAX_BAD_SHARE * self.num_samples:
            named = "; ".join(f"{shown(bad['name'])} {bad['reason']}" for bad in self.files[:MAX_NAMED])
            raise DatasetInvalid(
                f"more than {MAX_BAD_SHARE:.0%} of {self.num_samples} {self.noun} cannot be read: {named}"
            )

    def as_json(self) -> dict[str, Any]:
        """``count``, and the first ``files`` with their reasons."""
        return {"count": self.count, "files": self.files}
