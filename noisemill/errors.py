"""Everything the client can raise, as one tree. Each message says what to do.

* NoisemillError
  - ClientError
    x ServerUnreachable      nobody answers there, or no address is known
    x UnexpectedAnswer       somebody answers, but not a Noisemill server
    x ApiError               the server said no; ``problem`` tells why (RFC 9457)
    x JobEnded               the job is over, without a result; ``job`` is its last view
      + JobFailed
      + JobCanceled
    x WaitTimeout            the job goes on, the waiting does not
    x TransferFailed         bytes did not arrive whole
    x UnsafeName             a file name that points outside the folder it should go to
    x InvalidInput           what was given cannot be sent
"""

from shared.errors import NoisemillError
from shared.wire import JobView, Problem

__all__ = [
    "ApiError",
    "ClientError",
    "InvalidInput",
    "JobCanceled",
    "JobEnded",
    "JobFailed",
    "NoisemillError",
    "ServerUnreachable",
    "TransferFailed",
    "UnexpectedAnswer",
    "UnsafeName",
    "WaitTimeout",
]

_HINTS = {
    "unauthorized": "Check the API key (NOISEMILL_API_KEY, or Client(api_key=...)).",
    "forbidden": "Use an API key that has the scope for it.",
    "quota_exceeded": "Wait for jobs to end, or ask for a larger quota.",
    "dependency_failed": "Retry the job that was to make the model first.",
    "queue_full": "Try again later.",
    "rate_limited": "Send fewer requests, or try again later.",
}


class ClientError(NoisemillError):
    """Anything the client raises."""


class ServerUnreachable(ClientError):
    """Nobody answers at the address, or no address is known."""

    code = "server_unreachable"


class UnexpectedAnswer(ClientError):
    """The answer is not one that a Noisemill server gives."""

    code = "unexpected_answer"


class ApiError(ClientError):
    """The server refused the request, or could not fulfil it."""

    def __init__(self, problem: Problem, *, retry_after: float | None = None) -> None:
        super().__init__(_explain(problem))
        self.problem = problem
        self.status = problem.status
        self.code = problem.code  # pyright: ignore[reportAttributeAccessIssue]
        self.retry_after = retry_after
        """Seconds after which the server wants to be asked again, if it said so."""


def _explain(problem: Problem) -> str:
    lines = [problem.detail or problem.title]
    lines += [f"  {error.pointer or error.parameter or 'the body'}: {error.detail}" for error in problem.errors]
    if hint := _HINTS.get(problem.code):
        lines.append(hint)
    if problem.status >= 500:
        place = f" of request {problem.request_id}" if problem.request_id else ""
        lines.append(f"The server's log{place} tells more.")
    return "\n".join(lines)


class JobEnded(ClientError):
    """The job is over and has no result."""

    def __init__(self, message: str, job: JobView) -> None:
        super().__init__(message)
        self.job = job


class JobFailed(JobEnded):
    """The job failed, or expired before a worker took it."""

    def __init__(self, job: JobView) -> None:
        super().__init__(_failure(job), job)
        self.code = job.error.code if job.error else job.state  # pyright: ignore[reportAttributeAccessIssue]


def _failure(job: JobView) -> str:
    if job.state == "expired":
        return f"{job.id} expired: no worker started it in time. Start one, or submit it with a later deadline."
    if job.error is None:
        return f"{job.id} {job.state}."
    tries = "" if job.attempt <= 1 else f" after {job.attempt} attempts"
    causes = [cause.code for cause in job.error.causes]
    before = f" Its attempts ended by {', '.join(causes)}." if len(set(causes)) > 1 else ""
    again = f" `noisemill jobs retry {job.id}` may help." if job.error.retryable else ""
    return f"{job.id} failed{tries} ({job.error.code}): {job.error.message.rstrip('.')}.{before}{again}"


class JobCanceled(JobEnded):
    """Somebody canceled the job."""

    code = "canceled"

    def __init__(self, job: JobView) -> None:
        super().__init__(f"{job.id} was canceled.", job)


class WaitTimeout(ClientError, TimeoutError):
    """The time to wait is over; the job goes on."""

    code = "wait_timeout"

    def __init__(self, job: JobView, seconds: float) -> None:
        super().__init__(
            f"{job.id} is still {job.state} after {seconds:g} s ({job.progress.value:.0%}). It goes on: "
            f"wait again, or stop it with `noisemill jobs cancel {job.id}`."
        )
        self.job = job


class TransferFailed(ClientError):
    """Bytes did not arrive whole, after several tries."""

    code = "transfer_failed"


class UnsafeName(ClientError):
    """The name would put a file outside the folder it should go to."""

    code = "unsafe_name"


class InvalidInput(ClientError):
    """What was given cannot be sent."""

    code = "invalid_input"
