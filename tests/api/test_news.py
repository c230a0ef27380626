"""The subscription to bells ends with the process, whatever the library makes of being canceled."""

import asyncio
from typing import Any

import pytest
from redis.asyncio.client import PubSub

from api.news import News
from shared.events import connect_async
from shared.ids import uuid7
from shared.settings import Settings


def test_it_ends_though_a_cancellation_is_taken_for_a_time_out(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_message, swallowed = PubSub.get_message, []

    async def swallowing(self: PubSub, *how: Any, **more: Any) -> Any:
        try:
            return await get_message(self, *how, **more)
        except asyncio.CancelledError:
            swallowed.append(True)
            return None

    async def begin_and_end() -> None:
        redis = connect_async(settings.broker)
        news = News(redis, settings.broker)
        async with news.running():
            with news.of(uuid7()) as listener:
                while not news.hears:
                    await listener.wait(1)
        await redis.aclose()

    monkeypatch.setattr(PubSub, "get_message", swallowing)
    asyncio.run(asyncio.wait_for(begin_and_end(), 20))
    assert swallowed
