"""What surrounds every request: its id, its time, the headers that keep browsers careful, and the last resort.

Plain ASGI, because it must see streams as they are.
"""

import logging
import re
import secrets
import time
from typing import TYPE_CHECKING, Any, Final

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect

from api import errors

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from api.metrics import Meters

logger = logging.getLogger(__name__)

REQUEST_ID: Final = "X-Request-Id"
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_HEADERS: Final = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class RequestFrame:
    """The outermost layer of the app."""

    def __init__(self, app: "ASGIApp", meters: "Meters") -> None:
        self._app = app
        self._meters = meters

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status: int | None = None

        async def framed(message: "Message") -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                self._record(scope, message["status"], time.perf_counter() - started, request_id)
            await send(message)

        try:
            await self._app(scope, receive, framed)
        except ClientDisconnect:
            logger.info("%s %s: the client hung up; request_id=%s", scope["method"], scope["path"], request_id)
        except Exception:
            logger.exception("%s %s failed; request_id=%s", scope["method"], scope["path"], request_id)
            if status is not None:
                raise  # half an answer is out: only the connection can still say that something is wrong
            await errors.internal(Request(scope))(scope, receive, framed)

    def _record(self, scope: "Scope", status: int, seconds: float, request_id: str) -> None:
        """Time is counted to the first byte of the answer: a stream's end says nothing about us."""
        route: Any = scope.get("route")
        template = getattr(route, "path", None) or "unknown"
        self._meters.requests.labels(scope["method"], template, str(status)).observe(seconds)
        logger.info(
            "%s %s %d %.1f ms request_id=%s", scope["method"], scope["path"], status, seconds * 1000, request_id
        )


def _request_id(scope: "Scope") -> str:
    given = Request(scope).headers.get(REQUEST_ID, "")
    return given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
