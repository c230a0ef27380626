"""What a job's executor may ask of the runner around it. Knows neither SQL nor Celery.

An executor (``worker/jobs/*.py``) is a function ``(run: Run) -> result``. It reads its
assignment, fetches its inputs, reports each step, publishes objects and returns a JSON result. One whose jobs share
the device is a function ``(desk: Desk)`` instead, and settles each of them.
Everything it reports travels over a pipe to the supervisor, which commits it under the fence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from shared.errors import InputUnreadable
from worker.code_cache import CodeCache
from worker.gathering import Gathering

StopReason = Literal["cancel", "interrupt", "pause", "preempt"]

_URGENCY: Final[Mapping[StopReason, int]] = {"preempt": 0, "interrupt": 1, "pause": 1, "cancel": 2}


def most_urgent(first: StopReason | None, later: StopReason) -> StopReason:
    """Of two reasons to stop the one that counts: the first, unless the later one is more urgent."""
    return later if first is None or _URGENCY[later] > _URGENCY[first] else first


class InputDamaged(InputUnreadable):
    """Storage has the object, and its bytes are not those that were stored, however often they are read."""


class Stopped(Exception):
    """The job was asked to stop; raised by ``Run.step`` or ``Run.boundary`` and passed on by every executor."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason)
        self.reason = reason


class Parted(Exception):
    """What was done for several jobs at once failed, and nobody knows because of which: each is to be tried alone."""


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """An immutable object in storage: where it is and what it must hash to."""

    key: str
    sha256: str
    size_bytes: int

    def as_json(self) -> dict[str, Any]:
        return {"key": self.key, "sha256": self.sha256, "size_bytes": self.size_bytes}


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """One attempt at one job, as the supervisor hands it to the runner. Plain JSON.

    ``inputs`` by job type:

    * ingest: ``source`` {key, sha256, size_bytes, filename}
    * train: ``dataset`` {id, modality, info, files: [{name, key, sha256, size_bytes}]},
      ``further_datasets`` {field of the spec: dataset likewise}, ``models`` {field of the spec: model as below} and
      ``resume`` [{key, sha256, size_bytes, step}], the best first: the first that is intact is used
    * generate: ``model`` {id, name, version, family, spec, info, weights: {key, sha256, size_bytes}}
      and, for tasks that read images, ``dataset`` as above or ``images`` [{key, sha256, size_bytes}]; the mask of
      ``inpaint`` is ``mask_dataset`` or ``mask_image``, likewise, and a style ``style_dataset`` or ``style_image``;
      ``resume`` as above, from the second attempt on: lists of samples (``worker/jobs/kept.py``)
    * evaluate: ``model`` and ``dataset`` as above
    * reaverage: ``model`` and ``dataset`` as above, ``averages`` {key, sha256, size_bytes}
    * export: ``model`` as above, ``dataset`` as above where it is known
    * import: ``dataset`` as above, of modality ``model``, and ``model`` {family, spec, info}: what it is of
    """

    job_id: str
    fence: int
    type: str
    spec: Mapping[str, Any]
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def attempt(self) -> dict[str, Any]:
        """What every message about it carries: the runner outlives jobs, and all of them have an attempt 1."""
        return {"job_id": self.job_id, "fence": self.fence}


class Run(Protocol):
    """The runner, as seen by an executor."""

    @property
    def assignment(self) -> Assignment: ...

    @property
    def device(self) -> str:
        """A torch device string: ``cpu`` or ``cuda:0``."""
        ...

    @property
    def devices(self) -> Sequence[str]:
        """The devices that a training may use, ``device`` first; on CPUs, one name for each process."""
        ...

    @property
    def gathering(self) -> Gathering:
        """Where other hosts wait to help with a training."""
        ...

    @property
    def feature_networks(self) -> Path | None:
        """The operator's folder of feature networks."""
        ...

    @property
    def code_cache(self) -> CodeCache:
        """Where this machine keeps code that it compiled for networks."""
        ...

    def found_model(self, *, was_loaded: bool) -> None:
        """Say whether the job's model was on the device already."""
        ...

    def phase(self, name: str) -> None:
        """Say what the job is doing now (``loading_data``, ``training``, ``uploading`` …)."""
        ...

    def step(self, step: int, steps: int, **values: float) -> None:
        """Report that ``step`` of ``steps`` is done. Cheap; call it after every step.

        Raises:
            Stopped: the job was canceled, interrupted or paused. Checkpoint if the reason is
                not ``cancel``, and let it rise.
        """
        ...

    def boundary(self) -> None:
        """Say that this is a good moment to give the device away: a checkpoint is due.

        Raises:
            Stopped: a more urgent job waits for the device (``preempt``), or as from ``step``.
        """
        ...

    def metrics(self, step: int, split: Literal["train", "held_out"], values: Mapping[str, float]) -> None:
        """Record measured figures durably (one event each call; not for every step)."""
        ...

    def log(self, message: str) -> None:
        """Tell the user something in one sentence, durably."""
        ...

    def publish(
        self,
        kind: Literal["sample", "sheet", "preview", "checkpoint", "weights", "dataset", "report", "export"],
        name: str,
        body: bytes | Path,
        *,
        media_type: str,
        metadata: Mapping[str, Any] | None = None,
    ) -> StoredObject:
        """Upload under this attempt's prefix, then announce it; it exists once its row commits.

        Previews and checkpoints become visible at once, all else together with the result.
        """
        ...

    def fetch(self, stored: StoredObject) -> Path:
        """Download into the content-addressed cache, verify the SHA-256, return the path.

        Raises:
            InputGone: there is no such object.
            InputDamaged: its bytes are not those that were stored.
            InputUnreadable: storage refuses to hand it out.
            StorageUnavailable: storage is away.
            DiskFailed: there is no room for it here.
        """
        ...


class Desk(Protocol):
    """Where jobs that share the device arrive, while others of them are being worked on."""

    @property
    def device(self) -> str:
        """A torch device string."""
        ...

    def arrivals(self) -> Sequence[Run]:
        """What has come since the last call; the first call gives the job that all began with. Does not wait."""
        ...

    def room(self, samples: int) -> None:
        """Say how many more samples could be drawn at once with those that are being drawn. Cheap."""
        ...

    def settle(self, run: Run, result: Callable[[], dict[str, Any]]) -> None:
        """End the attempt with what ``result`` returns or raises."""
        ...
