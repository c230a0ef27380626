"""What goes into requests and what comes out of answers: identifiers, headers, views. Sends nothing."""

from typing import TypeVar
from urllib.parse import quote

from pydantic import ValidationError

from noisemill.errors import InvalidInput, JobCanceled, JobFailed, UnexpectedAnswer, WaitTimeout
from shared.wire import EventView, JobView, ProgressView, View

ViewT = TypeVar("ViewT", bound=View)


def progress_of(event: EventView) -> ProgressView:
    """What a ``job.progress`` event says, in the shape that ``JobView.progress`` has."""
    known = {name: event.data[name] for name in ("value", "step", "steps") if name in event.data}
    figures = {
        name: value for name, value in event.data.items() if name not in ("value", "step", "steps", "phase", "attempt")
    }
    return ProgressView(**known, figures=figures)


def outcome(job: JobView, timeout: float | None) -> JobView:
    """The job, if it has succeeded.

    Raises:
        JobFailed, JobCanceled: it ended without a result.
        WaitTimeout: it has not ended.
    """
    if job.state == "succeeded":
        return job
    if job.state == "canceled":
        raise JobCanceled(job)
    if job.is_final:
        raise JobFailed(job)
    raise WaitTimeout(job, timeout or 0)


def parse(view: type[ViewT], content: bytes) -> ViewT:
    """The body of an answer; raises ``UnexpectedAnswer`` if it is not such a view."""
    try:
        return view.model_validate_json(content)
    except ValidationError as error:
        field = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise UnexpectedAnswer(
            f"The answer is not a {view.__name__} ({field or 'body'}: {error.errors()[0]['msg']}). Check that "
            "NOISEMILL_URL is a Noisemill server of this client's version."
        ) from error


def header(value: str) -> str:
    """An idempotency key that fits into a header."""
    if not (value.isascii() and value.isprintable()):
        raise InvalidInput(f"The idempotency key {value!r} does not fit into a header: use letters, digits and dashes.")
    return value


def quoted(identifier: str) -> str:
    """An identifier as one segment of a path, whatever characters it holds."""
    segment = quote(identifier, safe="@")
    if segment in ("", ".", ".."):
        raise InvalidInput(f"{identifier!r} is no identifier: give one like those that lists show.")
    return segment
