"""Every error as one shape: ``application/problem+json`` (RFC 9457). The only place that knows HTTP statuses of ours.

What a client sees never holds internals: a bug of ours is "internal" and a request id, by which the log tells more.
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from api.parts import Parts
from api.room import seconds_until_room
from api.together import Ended
from shared import errors
from shared.database import AWAY
from shared.errors import RequestRefused
from shared.specs.gate import Check
from shared.wire import FieldError, Problem

PROBLEM_TYPE: Final = "application/problem+json"
RETRY_SECONDS: Final = 2
"""What ``Retry-After`` of a 503 says."""


class MalformedBody(RequestRefused):
    """The body cannot be read at all."""

    code = "malformed_body"


class FieldsRefused(RequestRefused):
    """One or more fields are wrong."""

    code = "validation_failed"

    def __init__(self, fields: Sequence[FieldError]) -> None:
        super().__init__(f"{fields[0].detail}" if len(fields) == 1 else f"{len(fields)} fields are wrong")
        self.fields = list(fields)


STATUS: Final[Mapping[type[RequestRefused], HTTPStatus]] = {
    RequestRefused: HTTPStatus.BAD_REQUEST,
    MalformedBody: HTTPStatus.BAD_REQUEST,
    errors.Unauthorized: HTTPStatus.UNAUTHORIZED,
    errors.Forbidden: HTTPStatus.FORBIDDEN,
    errors.NotFound: HTTPStatus.NOT_FOUND,
    errors.Gone: HTTPStatus.GONE,
    errors.IllegalMove: HTTPStatus.CONFLICT,
    errors.NotReproducible: HTTPStatus.CONFLICT,
    errors.QueueFull: HTTPStatus.TOO_MANY_REQUESTS,
    errors.IdempotencyInProgress: HTTPStatus.CONFLICT,
    errors.IdempotencyMismatch: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.GateFailed: HTTPStatus.CONFLICT,
    errors.PreconditionFailed: HTTPStatus.PRECONDITION_FAILED,
    errors.InvalidSpec: HTTPStatus.UNPROCESSABLE_ENTITY,
    FieldsRefused: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.TooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.TooSlow: HTTPStatus.REQUEST_TIMEOUT,
    errors.UnsupportedMedia: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
}

_HEADERS: Final[Mapping[type[RequestRefused], Mapping[str, str]]] = {
    errors.IdempotencyInProgress: {"Retry-After": "1"},
    # The rest of the body is not read, so the connection cannot carry another request.
    errors.TooLarge: {"Connection": "close"},
    errors.TooSlow: {"Connection": "close"},
}

_CODES: Final[Mapping[int, str]] = {404: "not_found", 405: "method_not_allowed"}


def problem(
    request: Request,
    status: int,
    code: str,
    detail: str,
    fields: Sequence[FieldError] = (),
    headers: Mapping[str, str] | None = None,
    **extension: Any,
) -> Response:
    """The answer that an error becomes; ``extension`` is what this kind of problem tells besides."""
    body = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        instance=request.url.path,
        code=code,
        errors=list(fields),
        request_id=getattr(request.state, "request_id", None),
        **extension,
    )
    content = body.model_dump_json(exclude_none=True)
    return Response(content, status, headers=dict(headers or {}), media_type=PROBLEM_TYPE)


def internal(request: Request) -> Response:
    """The answer to a request that found a bug of ours."""
    return problem(
        request, HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "something went wrong; the log has the request id"
    )


async def _refused(request: Request, error: Any) -> Response:
    status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    fields = error.fields if isinstance(error, FieldsRefused) else []
    if error.pointer is not None:
        fields = [FieldError(pointer=error.pointer, detail=error.detail)]
    headers = {**_HEADERS.get(type(error), {}), **getattr(error, "headers", {})}
    return problem(request, status, error.code, error.detail, fields, headers)


async def _gate_failed(request: Request, error: Any) -> Response:
    checks = [Check.model_validate(one) for one in error.checks]
    fields = [FieldError(pointer="/version", detail=one.reason) for one in checks if not one.passed]
    return problem(request, STATUS[errors.GateFailed], error.code, error.detail, fields, checks=checks)


async def _queue_full(request: Request, error: Any) -> Response:
    seconds = await seconds_until_room(await Parts.of(request), request.state.tenant_id)
    error.headers = {"Retry-After": str(seconds)}
    return await _refused(request, error)


async def _parameters_refused(request: Request, error: Any) -> Response:
    """Path, query and header parameters; bodies are read by ``api/body.py``."""
    fields = [
        FieldError(parameter=" ".join(str(part) for part in wrong["loc"][:2]), detail=wrong["msg"])
        for wrong in error.errors()
    ]
    return await _refused(request, FieldsRefused(fields))


async def _http(request: Request, error: Any) -> Response:
    """What the router says: no such path, or not this method."""
    code = _CODES.get(error.status_code, "invalid_request")
    detail = f"{request.method} {request.url.path}: {HTTPStatus(error.status_code).phrase.lower()}"
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(sorted(_allowed_methods(request)))  # the router names one route's only
    return problem(request, error.status_code, code, detail, headers=headers)


def _allowed_methods(request: Request) -> set[str]:
    routes = [route for router in request.app.state.routers for route in router.routes]
    return {method for route in routes if route.path_regex.match(request.url.path) for method in route.methods}


_AWAY: Final[Mapping[type[Exception], str]] = {errors.StorageError: "storage", Ended: "this server, which ends,"}


async def _away(request: Request, error: Any) -> Response:
    what = next((name for kind, name in _AWAY.items() if isinstance(error, kind)), "the database")
    retry = {"Retry-After": str(RETRY_SECONDS)}
    detail = f"{what} does not answer right now; try again"
    return problem(request, HTTPStatus.SERVICE_UNAVAILABLE, "unavailable", detail, headers=retry)


def install(app: FastAPI) -> None:
    """Make the app answer every error in this shape."""
    app.add_exception_handler(RequestRefused, _refused)
    app.add_exception_handler(errors.QueueFull, _queue_full)
    app.add_exception_handler(errors.GateFailed, _gate_failed)
    app.add_exception_handler(RequestValidationError, _parameters_refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(errors.StorageError, _away)
    app.add_exception_handler(Ended, _away)
    for kind in AWAY:
        app.add_exception_handler(kind, _away)
