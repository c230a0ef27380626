"""The short way of the request that comes most often: a submission, past the routing and the dependencies of FastAPI.

FastAPI works out of each request again which dependencies its route has; that takes longer than all they do. What they
are, what they refuse and in which order is the same here: ``tests/api/test_shortcut.py`` sends requests both ways.
"""

from typing import TYPE_CHECKING, Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import SecurityScopes
from pydantic import TypeAdapter, ValidationError
from starlette.middleware.exceptions import ExceptionMiddleware

from api.auth import BEARER, authenticate
from api.paging import refuse_unknown_parameters
from api.parts import Parts
from api.routes import jobs
from api.routes.dependencies import IdempotencyKey
from api.views import Links

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_MAY_WRITE: Final = SecurityScopes(["jobs:write"])
_KEY: Final = "Idempotency-Key"
_KEYS: Final = TypeAdapter[str | None](IdempotencyKey)


class Shortcut:
    """A layer inside of ``RequestFrame``: takes submissions, and passes on everything else."""

    def __init__(self, app: "ASGIApp", outer: FastAPI) -> None:
        self._app = app
        self._submission = ExceptionMiddleware(_submit, outer.exception_handlers)

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "http" and scope["path"] == "/v1/jobs" and scope["method"] == "POST":
            scope["route"] = jobs.SUBMISSION
            await self._submission(scope, receive, send)
        else:
            await self._app(scope, receive, send)


async def _submit(scope: "Scope", receive: "Receive", send: "Send") -> None:
    response = await _answer(Request(scope, receive, send))
    await response(scope, receive, send)


async def _answer(request: Request) -> Response:
    await refuse_unknown_parameters(request)
    known: dict[str, Any] = {
        "caller": await authenticate(_MAY_WRITE, request, await BEARER(request)),
        "body": await jobs.BODY(request),
        "request": request,
        "parts": await Parts.of(request),
        "links": await Links.of(request),
    }
    return await jobs.submit_job(
        **known, idempotency_key=_idempotency_key(request), prefer=request.headers.getlist("prefer")
    )


def _idempotency_key(request: Request) -> str | None:
    try:
        return _KEYS.validate_python(request.headers.get(_KEY))
    except ValidationError as error:
        raise RequestValidationError(
            [{**wrong, "loc": ("header", _KEY)} for wrong in error.errors(include_url=False)]
        ) from error
