"""Requests that get through: bounded retries with backoff, and errors that say what to do.

Knows HTTP and problem documents, but no resource of the API.
"""

import random
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
from pydantic import ValidationError

from noisemill.discovery import Server
from noisemill.errors import ApiError, ServerUnreachable, UnexpectedAnswer
from shared.wire import Problem

# Neither the first nor the second was processed, so asking again is safe even for what must happen once.
_NOT_PROCESSED: Final = frozenset({429, 503})
_PASSING: Final = frozenset({429, 502, 503, 504})
_LONGEST_PAUSE: Final = 8.0
_LONGEST_RETRY_AFTER: Final = 60.0
# A server that never answered is more likely absent than restarting: say so soon.
_TRIES_OF_A_STRANGER: Final = 2

_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_NO_PROXY = {"all://localhost": None, "all://127.0.0.1": None, "all://[::1]": None}


def backoff(tries: int) -> float:
    """Seconds to wait after the ``tries``-th failure in a row: doubling, with jitter, bounded."""
    return min(0.1 * 2**tries, _LONGEST_PAUSE) * random.uniform(0.5, 1.0)


def plain_client(timeout: float) -> httpx.Client:
    """A client without credentials, for presigned URLs. Local addresses bypass any proxy."""
    return httpx.Client(timeout=timeout, mounts=_NO_PROXY, verify=_trust())


@cache
def _trust() -> ssl.SSLContext:
    """The certificates to trust; reading them takes longer than most requests."""
    return httpx.create_ssl_context()


class Transport:
    """One server, spoken to patiently."""

    def __init__(self, server: Server, *, timeout: float, max_retries: int) -> None:
        self.server = server
        self.timeout = timeout
        self._max_retries = max_retries
        self.has_answered = False
        headers = {"User-Agent": "noisemill-client"}
        if server.api_key:
            headers["Authorization"] = f"Bearer {server.api_key}"
        try:
            self._http = httpx.Client(
                base_url=server.url, headers=headers, timeout=timeout, mounts=_NO_PROXY, verify=_trust()
            )
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise UnexpectedAnswer(f"{server.url!r} with this key is not a server's address: {error}") from error

    def close(self) -> None:
        self._http.close()

    def request(self, method: str, path: str, *, repeatable: bool, **options: Any) -> httpx.Response:
        """Send, and send again while that may help; ``repeatable`` says that twice is the same as once.

        Raises:
            ApiError: the server said no, for good or too often.
            ServerUnreachable: nobody answered.
        """
        for tries in range(1, self._max_retries + 2):
            try:
                response = self._http.request(method, path, **options)
            except httpx.TransportError as error:
                if not self._may_resend(error, tries, repeatable=repeatable):
                    raise self.unreachable(error) from error
                time.sleep(backoff(tries))
                continue
            self.has_answered = True
            if response.is_success:
                return response
            refusal = refusal_of(response)
            pause = backoff(tries) if refusal.retry_after is None else refusal.retry_after
            if (
                tries > self._max_retries
                or pause > _LONGEST_RETRY_AFTER
                or not _may_pass(refusal, repeatable=repeatable)
            ):
                raise refusal
            time.sleep(pause)
        raise AssertionError("unreachable")

    @contextmanager
    def stream(
        self, path: str, *, params: Mapping[str, Any], headers: Mapping[str, str], silence: float
    ) -> Iterator[httpx.Response]:
        """Open a streaming GET, once; ``silence`` is the longest wait for the next bytes."""
        limits = httpx.Timeout(self.timeout, read=silence)
        with self._http.stream("GET", path, params=params, headers=headers, timeout=limits) as response:
            self.has_answered = True
            if not response.is_success:
                response.read()
                raise refusal_of(response)
            yield response

    def unreachable(self, error: httpx.TransportError) -> ServerUnreachable:
        """Say in one sentence why nobody was reached and what to do."""
        url = self.server.url
        if isinstance(error, httpx.UnsupportedProtocol):
            return ServerUnreachable(
                f"{url} is not a server's address: set NOISEMILL_URL to one like http://host:8000."
            )
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, _NEVER_SENT):
            return ServerUnreachable(
                f"The server at {url} did not answer within {self.timeout:g} s: try again, or look at its log."
            )
        if not isinstance(error, _NEVER_SENT):
            return ServerUnreachable(f"The connection to {url} broke ({error or type(error).__name__}): try again.")
        start = "start one with `noisemill up`" if _is_local(url) else "check the address and the network"
        return ServerUnreachable(f"No server at {url}: {start}, or set NOISEMILL_URL.")

    def _may_resend(self, error: httpx.TransportError, tries: int, *, repeatable: bool) -> bool:
        if isinstance(error, httpx.UnsupportedProtocol) or tries > self._max_retries:
            return False
        never_sent = isinstance(error, _NEVER_SENT)
        if never_sent and not self.has_answered and tries > _TRIES_OF_A_STRANGER:
            return False
        return repeatable or never_sent


def _may_pass(refusal: ApiError, *, repeatable: bool) -> bool:
    if refusal.code == "quota_exceeded":
        return False
    if refusal.code == "idempotency_in_progress":
        return True  # our own first try, whose answer was lost, is still being worked on
    return refusal.status in (_PASSING if repeatable else _NOT_PROCESSED)


def refusal_of(response: httpx.Response) -> ApiError:
    """The error that an answer stands for, also when a proxy in between wrote it."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        reason = response.reason_phrase or "no reason given"
        said = f"{urlsplit(str(response.url)).netloc} answered {response.status_code} ({reason})."
        problem = Problem(title=reason, status=response.status_code, detail=said, code=f"http_{response.status_code}")
    return ApiError(problem, retry_after=_retry_after(response.headers.get("Retry-After")))


def _retry_after(value: str | None) -> float | None:
    """Seconds; the header holds seconds or a date (RFC 9110 §10.2.3)."""
    if value is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return None


def _is_local(url: str) -> bool:
    return urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
