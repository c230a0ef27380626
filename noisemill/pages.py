"""Reading what the server shows: one thing, or lists page by page."""

from collections.abc import Iterator, Mapping
from typing import Any

from noisemill.answers import ViewT, parse
from noisemill.transport import Transport
from shared.wire import Page


def fetch(transport: Transport, view: type[ViewT], path: str) -> ViewT:
    """The ``view`` at ``path``."""
    return parse(view, transport.request("GET", path, repeatable=True).content)


def fetch_all(
    transport: Transport, view: type[ViewT], path: str, filters: Mapping[str, Any] | None = None
) -> Iterator[ViewT]:
    """Everything of a list, fetched as it is looked at; filters that are None are left out."""
    params = {key: value for key, value in (filters or {}).items() if value is not None}
    while True:
        answer = transport.request("GET", path, repeatable=True, params=params)
        page = parse(Page[view], answer.content)
        yield from page.data
        if not page.has_more or page.next_cursor is None:
            return
        params["cursor"] = page.next_cursor
