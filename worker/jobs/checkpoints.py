"""A training's checkpoints in storage: found again where it begins, stored beside it while it runs. Knows no torch."""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from shared.errors import InputGone, JobError, ModelLoadFailed
from worker.engine.checkpoint import Checkpoint
from worker.jobs.background import Background
from worker.jobs.inputs import stored
from worker.run import InputDamaged, Run, Stopped, StoredObject

T = TypeVar("T")


class Checkpoints:
    """Those of one training, of this attempt and of the ones before."""

    def __init__(self, run: Run, *, keep: int) -> None:
        self._run, self._keep = run, keep
        self._known: list[tuple[int, StoredObject]] = [
            (fields["step"], stored(fields)) for fields in run.assignment.inputs["resume"]
        ]
        """Step and object of each, the best first."""
        self._uploads = Background()

    @property
    def newest(self) -> int:
        """The step that an attempt would go on from."""
        return self._known[0][0] if self._known else 0

    @property
    def is_busy(self) -> bool:
        """Whether one is being stored."""
        return self._uploads.is_busy

    def restore(self, resume: Callable[[Checkpoint], T]) -> T | None:
        """What ``resume`` makes of the best one that is intact; None if there is none.

        What is wrong with each better one goes into the job's log, and it is not tried again.
        """
        while self._known:
            step, checkpoint = self._known[0]
            try:
                return resume(Checkpoint.read(self._run.fetch(checkpoint)))
            except InputDamaged as error:
                trouble = f"is damaged ({error})"
            except InputGone:
                trouble = "is gone"
            except ModelLoadFailed as error:
                trouble = f"cannot be used ({error})"
            del self._known[0]
            then = f"going on from step {self.newest}" if self._known else "starting afresh"
            self._run.log(f"The checkpoint of step {step} {trouble}; {then}.")
        return None

    def begin(self, checkpoint: Checkpoint) -> None:
        """Store it beside the training, after the one under way; a failure is raised by the next call."""
        self._uploads.start(partial(self._store, checkpoint))

    def join(self) -> None:
        """Wait until nothing is under way, and raise what went wrong."""
        self._uploads.join()

    def abandon(self) -> None:
        """Wait for nothing and store nothing more."""
        self._uploads.abandon()

    def leave(self, take: Callable[[], Checkpoint], step: int) -> None:
        """Store the training as it is at ``step``, which is its last here, unless that was done.

        It was asked to stop: what goes wrong costs the steps since the last checkpoint, and not the job.
        """
        # What failed to be stored beside the training is part of the one that follows.
        with suppress(JobError, OSError, Stopped):
            self.join()
        if step <= self.newest:
            return
        try:
            self._store(take())
        except (JobError, OSError) as error:
            self._run.log(f"The checkpoint of step {step} was not stored ({error}); the last is of step {self.newest}.")

    def _store(self, checkpoint: Checkpoint) -> None:
        rollbacks = checkpoint.notes.get("rollbacks", 0)
        # After going back, the same step comes again within one attempt.
        name = f"checkpoint-{checkpoint.step:08d}{f'-{rollbacks}' if rollbacks else ''}.safetensors"
        metadata = {"step": checkpoint.step, "keep": self._keep, "score": checkpoint.notes.get("score")}
        with tempfile.TemporaryDirectory(prefix="noisemill-") as folder:
            path = Path(folder) / name
            checkpoint.write(path)
            published = self._run.publish(
                "checkpoint", name, path, media_type="application/octet-stream", metadata=metadata
            )
        self._known.insert(0, (checkpoint.step, published))
