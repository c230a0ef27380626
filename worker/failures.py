"""The job error that stands for whatever an attempt ended by. Knows no job."""

import errno
import traceback
from typing import Final

from shared.errors import DiskFailed, InternalError, JobError, OutOfMemory
from worker.channel import Message

_DISK_TROUBLE: Final = {
    errno.ENOSPC: "is full",
    errno.EDQUOT: "is full",
    errno.EFBIG: "takes no file of this size",
    errno.EROFS: "is read-only",
    errno.EIO: "is broken",
}


def told(error: BaseException) -> Message:
    """What the supervisor hears of it."""
    named = error if isinstance(error, JobError) else _named(error)
    if isinstance(named, InternalError):
        traceback.print_exception(error)
    return {"code": named.code, "message": str(named), "retryable": named.retryable}


def _named(error: BaseException) -> JobError:
    """The job error that stands for a foreign exception. Its text stays in the log, not in the answer."""
    if _is_out_of_memory(error):
        return OutOfMemory("the job does not fit into memory; ask for a smaller model")
    if isinstance(error, OSError) and error.errno in _DISK_TROUBLE:
        return disk_failed(error)
    return InternalError(f"{type(error).__name__} in the worker; its log has the traceback")


def _is_out_of_memory(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    from worker.engine.memory import is_out_of_memory  # imports torch, which a RuntimeError has most likely seen

    return is_out_of_memory(error)


def disk_failed(error: OSError) -> DiskFailed:
    """What is wrong with this machine's disk."""
    trouble = _DISK_TROUBLE.get(error.errno or 0, f"failed ({errno.errorcode.get(error.errno or 0, 'unknown')})")
    return DiskFailed(f"the worker's own disk {trouble}")
