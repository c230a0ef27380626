"""Everything that can go wrong, as one tree. The class is the decision; no HTTP status appears here.

* NoisemillError
  - RequestRefused           what a client asked for cannot be done
    - NotFound               no such thing for this tenant
    - Gone                   it was deleted
    - IllegalMove            the job is not in a state that allows this
    - NotReproducible        what the job read is gone, or it left nothing to compare with
    - InvalidSpec            the request can never work (names the field)
      - DependencyEnded      a job that it names ended without what it should have made
    - IdempotencyConflict    same key, other body, or still in flight
    - GateFailed             a version does not show what an alias asks for
    - PreconditionFailed     it is not any more what the client thinks it is
    - QueueFull              the tenant has as many jobs waiting as it may
    - Unauthorized, Forbidden
    - TooLarge, TooSlow, UnsupportedMedia
  - JobError                 ends an attempt, with a code that clients may match on
    - DatasetInvalid, InputGone, ModelLoadFailed, NanLoss, OutOfMemory, TimeLimitExceeded, InternalError
    - TrainingIndivisible
    - DependencyFailed, DependencyUnfit    end a job that waits for others
    - Stalled, UploadFailed, InputUnreadable, DiskFailed, WorkerLost     retryable
    - StorageUnavailable     retryable, and counts against no limit
  - FamilyRefused            an installed package offers a family that cannot be used
  - LeaseLost                this attempt is no longer the current one
  - StorageError             S3 said no, or said nothing
    - TransferFailed         another try may work
      - StorageAway          an outage
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class NoisemillError(Exception):
    """Base of all of our errors."""

    code: ClassVar[str] = "internal"


class RequestRefused(NoisemillError):
    """A client asked for something that cannot be done; ``pointer`` names the field (RFC 6901)."""

    code = "invalid_request"

    def __init__(self, detail: str, *, pointer: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.pointer = pointer


class NotFound(RequestRefused):
    """No such thing, or it belongs to another tenant."""

    code = "not_found"


class Gone(RequestRefused):
    """It existed and was deleted."""

    code = "gone"


class IllegalMove(RequestRefused):
    """The job is not in a state that allows this."""

    code = "invalid_state"


class NotReproducible(RequestRefused):
    """The job cannot be run again as it was: what it read is gone, or it left nothing to compare with."""

    code = "not_reproducible"


class InvalidSpec(RequestRefused):
    """The request is well formed and can never work."""

    code = "validation_failed"


class DependencyEnded(InvalidSpec):
    """A job that the request names ended without making what it was named for."""

    code = "dependency_failed"


class IdempotencyMismatch(RequestRefused):
    """The idempotency key was used before with another body."""

    code = "idempotency_key_reuse"


class IdempotencyInProgress(RequestRefused):
    """The first request with this idempotency key has not ended yet."""

    code = "idempotency_in_progress"


class GateFailed(RequestRefused):
    """The version does not show what the alias asks for; ``checks`` tells bound by bound."""

    code = "gate_failed"

    def __init__(self, detail: str, checks: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(detail)
        self.checks = list(checks)


class PreconditionFailed(RequestRefused):
    """It is not any more what the client thinks it is."""

    code = "precondition_failed"


class QueueFull(RequestRefused):
    """The tenant has as many jobs waiting as it may."""

    code = "queue_full"


class Unauthorized(RequestRefused):
    """No key, or not one of ours."""

    code = "unauthorized"


class Forbidden(RequestRefused):
    """The key lacks the scope."""

    code = "forbidden"


class TooLarge(RequestRefused):
    """The body is above the limit."""

    code = "payload_too_large"


class TooSlow(RequestRefused):
    """The client stopped sending its body."""

    code = "request_timeout"


class UnsupportedMedia(RequestRefused):
    """The content type is not one we read."""

    code = "unsupported_media_type"


class JobError(NoisemillError):
    """Ends an attempt. ``retryable`` decides whether another one may follow."""

    retryable: ClassVar[bool] = False
    is_outage: ClassVar[bool] = False
    """What the job needs is away for everybody: no attempt is charged, and the next one waits."""


class InternalError(JobError):
    """A bug of ours."""


class DatasetInvalid(JobError):
    """The uploaded data cannot be made into a dataset; the message says which file and why."""

    code = "dataset_invalid"


class InputGone(JobError):
    """A dataset or model that the job refers to was deleted before it ran, or its object is missing."""

    code = "input_gone"


class ModelLoadFailed(JobError):
    """The weights do not fit their description."""

    code = "model_load_failed"


class NanLoss(JobError):
    """The loss, or a sample, stopped being a number."""

    code = "nan_loss"


class OutOfMemory(JobError):
    """Not even the smallest batch fits."""

    code = "out_of_memory"


class TrainingIndivisible(JobError):
    """Several processes cannot share the batches of this training."""

    code = "training_indivisible"


class DependencyFailed(JobError):
    """A job whose model this one waits for ended without making it."""

    code = "dependency_failed"


class DependencyUnfit(JobError):
    """The model that this job waited for is there, and is not what the job was accepted for."""

    code = "dependency_unfit"


class TimeLimitExceeded(JobError):
    """The attempt ran longer than it may."""

    code = "timeout"


class Stalled(TimeLimitExceeded):
    """No step for too long: more often the machine's fault than the job's."""

    retryable = True


class UploadFailed(JobError):
    """Storage refused what the attempt made, or spoilt it at each of several tries."""

    code = "upload_failed"
    retryable = True


class InputUnreadable(JobError):
    """An input is in storage and cannot be read: it is refused, or its bytes are not those that were stored."""

    code = "input_unreadable"
    retryable = True


class DiskFailed(JobError):
    """The worker's own disk is full, or does not work."""

    code = "disk_failed"
    retryable = True


class StorageUnavailable(JobError):
    """Storage did not answer, or could not do anything, for longer than an attempt waits."""

    code = "storage_unavailable"
    retryable = True
    is_outage = True


class WorkerLost(JobError):
    """The process that ran the attempt is gone."""

    code = "worker_lost"
    retryable = True


def retryable_codes() -> frozenset[str]:
    """Codes of errors after which another attempt may go well. Not of one that stalled: it has the code of its base."""
    return frozenset(error.code for error in JobError.__subclasses__() if error.retryable)


class FamilyRefused(NoisemillError):
    """An installed package offers a family that cannot be used: nothing starts, so that the operator sees it."""


class LeaseLost(NoisemillError):
    """This attempt is no longer the current one; nothing it does can count."""


class StorageError(NoisemillError):
    """Storage failed, or returned something else than what was stored."""


class TransferFailed(StorageError):
    """One request went wrong, and another may not: it was spoilt on its way, or nobody said that it was done."""


class StorageAway(TransferFailed):
    """Storage did not answer, or said that it can do nothing now: an outage, by which no request is judged."""
