"""A submission is answered the same, whether it goes the short way or the long one."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from shared.settings import Settings
from tests.api.support import Owner, serving, train_request


@pytest.fixture(scope="module")
def long_way(settings: Settings) -> Iterator[str]:
    """An API that is told of a prefix: it comes with each path, and only FastAPI takes it off."""
    with serving(settings, root_path="/under") as url:
        yield url


FINE: dict[str, Any] = {}
REQUESTS: dict[str, dict[str, Any]] = {
    "fine": {},
    "fine, with a key": {"headers": {"Idempotency-Key": "a-{way}"}},
    "fine, with preferences": {"headers": {"Prefer": "respond-async, wait=5"}},
    "no key to the API": {"headers": {"Authorization": ""}},
    "another scheme": {"headers": {"Authorization": "Basic eDp5"}},
    "nobody's key to the API": {"headers": {"Authorization": "Bearer nm_000000000000000000000"}},
    "nobody's key, an unknown parameter, a wrong body": {
        "headers": {"Authorization": "Bearer nobody"},
        "params": {"x": "1"},
        "content": b"{",
    },
    "an unknown parameter": {"params": {"priority": "high"}},
    "an unknown parameter and a wrong body": {"params": {"x": "1"}, "content": b"{"},
    "an empty key": {"headers": {"Idempotency-Key": ""}},
    "a key with a space": {"headers": {"Idempotency-Key": "a b"}},
    "a long key": {"headers": {"Idempotency-Key": "k" * 256}},
    "a wrong key and a wrong body": {"headers": {"Idempotency-Key": "a b"}, "content": b"{"},
    "a wrong key and a dataset that is not there": {"headers": {"Idempotency-Key": "a b"}, "dataset": "ds_" + "0" * 32},
    "no JSON": {"content": b"{"},
    "nothing": {"content": b""},
    "another type": {"headers": {"Content-Type": "text/plain"}},
    "encoded": {"headers": {"Content-Encoding": "gzip"}},
    "too large": {"content": b" " * 70_000},
    "a wrong field": {"fields": {"steps": 0}},
    "two wrong fields": {"fields": {"steps": 0, "stepz": 1}},
    "a dataset that is not there": {"dataset": "ds_" + "0" * 32},
}


def send(owner: Owner, url: str, dataset: str, how: dict[str, Any]) -> httpx.Response:
    body = json.dumps(train_request(how.get("dataset", dataset), **how.get("fields", {}))).encode()
    way = "long" if url else "short"
    headers = {"Content-Type": "application/json"}
    headers |= {name: value.replace("{way}", way) for name, value in how.get("headers", {}).items()}
    return owner.client.post(
        f"{url}/v1/jobs", content=how.get("content", body), headers=headers, params=how.get("params")
    )


def told(answer: httpx.Response) -> tuple[int, dict[str, str], dict[str, Any]]:
    """An answer without what is new in each, or tells the address."""
    new = ("date", "x-request-id", "location", "content-length")
    headers = {name: value for name, value in answer.headers.items() if name not in new}
    body = {name: value for name, value in answer.json().items() if name not in ("id", "created_at", "queue")}
    for name in ("request_id", "instance", "urls"):
        body[name] = name in body
    return answer.status_code, headers, body


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_is_answered_the_same_either_way(owner: Owner, long_way: str, name: str) -> None:
    dataset = owner.add_dataset()

    short, long = (send(owner, url, dataset, REQUESTS[name]) for url in ("", long_way))

    assert told(short) == told(long)


def test_who_may_not_submit_is_told_the_same_either_way(make_owner: Any, long_way: str) -> None:
    reader = make_owner(scopes=("jobs:read",))

    short, long = (send(reader, url, "ds_" + "0" * 32, FINE) for url in ("", long_way))

    assert short.status_code == 403
    assert told(short) == told(long)


def test_an_answer_of_the_short_way_is_counted_under_its_route(owner: Owner, api_url: str) -> None:
    send(owner, "", owner.add_dataset(), FINE)

    metrics = httpx.get(f"{api_url}/metrics").text

    assert 'method="POST",route="/v1/jobs",status="202"' in metrics
