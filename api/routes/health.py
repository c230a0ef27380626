"""Is it alive, can it serve, how much does it do: for orchestrators and Prometheus. No key, no secrets."""

import asyncio
from collections.abc import Awaitable
from typing import Literal

from fastapi import APIRouter, Request, Response, status
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import text

from api.parts import Parts
from api.routes.dependencies import TheParts
from shared.about import ReadinessView
from shared.database import AWAY
from shared.errors import StorageError

router = APIRouter(tags=["health"])

_PATIENCE_SECONDS = 2.5

Health = Literal["ok", "away"]


@router.get(
    "/healthz", operation_id="getHealth", response_class=Response, responses={200: {"content": {"text/plain": {}}}}
)
async def get_health() -> Response:
    """The process is alive. Says nothing about the servers it needs."""
    return Response("ok\n", media_type="text/plain")


@router.get(
    "/readyz",
    operation_id="getReadiness",
    responses={503: {"model": ReadinessView, "description": "The database is away."}},
)
async def get_readiness(parts: TheParts, response: Response) -> ReadinessView:
    """Whether requests can be served. Without broker or storage it is degraded, and ready: jobs wait in SQL."""
    database, broker, storage = await asyncio.gather(
        _health(_ask_database(parts)), _health(parts.broker.ping()), _health(parts.storage_probe.ask())
    )
    response.headers["Cache-Control"] = "no-store"
    if database == "away":
        response.status_code = status.HTTP_503_SERVICE_UNAVAILABLE
        return ReadinessView(status="away", database=database, broker=broker, storage=storage)
    all_ok = broker == storage == "ok"
    return ReadinessView(status="ok" if all_ok else "degraded", database=database, broker=broker, storage=storage)


@router.get(
    "/metrics", operation_id="getMetrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}}
)
def get_metrics(request: Request) -> Response:
    """Metrics in Prometheus's text format."""
    return Response(generate_latest(request.app.state.meters.registry), media_type=CONTENT_TYPE_LATEST)


async def _health(question: Awaitable[object]) -> Health:
    from redis.exceptions import RedisError  # noqa: PLC0415  (slow to import, and only a running app needs it)

    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await question
    except (*AWAY, RedisError, StorageError, OSError):  # OSError: TimeoutError is one
        return "away"
    return "ok"


async def _ask_database(parts: Parts) -> None:
    async with parts.engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
