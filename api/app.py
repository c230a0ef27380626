"""The composition root of the API: ``uvicorn api.app:create_app --factory``.

Light by promise: importing this loads neither torch nor the worker, nor what is only needed once requests come
(Celery, boto3); those are loaded when the app starts.
"""

import asyncio
import gc
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, Final

from fastapi import FastAPI

from api import errors, openapi
from api.auth import Callers
from api.crowd import Crowd
from api.ends import Ends
from api.frame import RequestFrame
from api.metrics import JobCollector, Meters
from api.news import News
from api.parts import Parts
from api.probe import StorageProbe
from api.relay import RelayThread
from api.routes import actions, aliases, artifacts, datasets, events, health, jobs, meta, models, pages, workers
from api.shortcut import Shortcut
from api.upkeep import UpkeepThread
from shared.database import make_async_engine, make_engine
from shared.settings import Settings

ROUTERS = (
    *(jobs.router, actions.router, events.router, artifacts.router, datasets.router, models.router, aliases.router),
    *(workers.router, meta.router, health.router, pages.router),
)

_LOCK_PATIENCE: Final = timedelta(seconds=0.5)
"""Of those that are answered together, for what somebody keeps locked; then each of them waits for itself."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The API as an ASGI app; settings come from the environment when left out."""
    settings = settings or Settings.read()
    app = FastAPI(
        title="Noisemill",
        version=openapi.VERSION,
        description=openapi.DESCRIPTION,
        openapi_tags=openapi.TAGS,
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.state.meters = Meters()
    app.state.routers = ROUTERS
    for router in ROUTERS:
        app.include_router(router)
    errors.install(app)
    openapi.install(app)
    app.add_middleware(Shortcut, outer=app)
    app.add_middleware(RequestFrame, meters=app.state.meters)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    parts = await asyncio.to_thread(_build, app.state.settings)
    app.state.parts, app.state.callers, app.state.crowd = parts, Callers(parts), Crowd(parts)
    app.state.ends = Ends(parts)
    collector = JobCollector(parts.metrics_engine)
    app.state.meters.registry.register(collector)
    threads = (parts.relay, parts.upkeep, app.state.callers, app.state.crowd, app.state.ends)
    for each in threads:
        each.start()
    _settle()
    try:
        with _ending_streams_at(signal.SIGTERM, signal.SIGINT, news=parts.news):
            async with parts.news.running():
                yield
    finally:
        app.state.meters.registry.unregister(collector)
        for each in reversed(threads):
            await asyncio.to_thread(each.stop)
        await parts.broker.aclose()
        await parts.engine.dispose()
        parts.thread_engine.dispose()
        parts.metrics_engine.dispose()


def _build(settings: Settings) -> Parts:
    # Not needed to import the app, and slow to import.
    from shared.events import connect_async  # noqa: PLC0415
    from shared.storage import Storage  # noqa: PLC0415

    broker = connect_async(settings.broker)
    storage = Storage(settings.s3)
    relay = RelayThread(settings)
    return Parts(
        settings=settings,
        engine=make_async_engine(settings.database, "noisemill-api"),
        # One thread records for all tenants: what somebody keeps locked of one must not keep it from the others.
        thread_engine=make_engine(settings.database, "noisemill-crowd", ping="rested", lock_timeout=_LOCK_PATIENCE),
        metrics_engine=make_engine(settings.database, "noisemill-metrics"),
        storage=storage,
        storage_probe=StorageProbe(storage),
        broker=broker,
        news=News(broker, settings.broker),
        relay=relay,
        upkeep=UpkeepThread(settings, relay.wake),
    )


def _settle() -> None:
    """Take what is there by now, and stays, out of the search for garbage: among it the search stops every request for
    a quarter of a second, once in some 800 submissions. In a process of our own alone, not where tests start apps."""
    if threading.current_thread() is threading.main_thread():
        gc.collect()
        gc.freeze()


@contextmanager
def _ending_streams_at(*signals: signal.Signals, news: News) -> Iterator[None]:
    """End event streams when the server is told to stop, because it waits for open answers before it ends the app."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before: dict[signal.Signals, Any] = {}

    def end(number: int, frame: FrameType | None) -> None:
        with suppress(RuntimeError):  # the loop is closed already
            loop.call_soon_threadsafe(news.close)
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    for each in signals:
        handler = signal.getsignal(each)
        # Only a server's own handler is wrapped; the default action must stay what it is.
        if callable(handler) and handler is not signal.default_int_handler:
            before[each] = handler
            signal.signal(each, end)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
