"""The same request twice is one job; another request with the same key is refused."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.api.conftest import MakeOwner
from tests.api.support import Owner, train_request


def post(owner: Owner, body: object, key: str) -> httpx.Response:
    return owner.client.post("/v1/jobs", json=body, headers={"Idempotency-Key": key})


def test_a_repeated_request_is_answered_as_the_first_was(owner: Owner) -> None:
    body = train_request(owner.add_dataset())
    first = post(owner, body, "k")
    owner.client.post(first.json()["urls"]["cancel"])

    again = post(owner, dict(reversed(body.items())), "k")

    assert again.content == first.content
    assert (again.status_code, again.headers["Location"]) == (202, first.headers["Location"])
    assert again.headers["Idempotency-Replayed"] == "true" and "Idempotency-Replayed" not in first.headers


def test_64_requests_at_once_make_one_job_and_get_one_answer(owner: Owner) -> None:
    body = train_request(owner.add_dataset())

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: post(owner, body, "k"), range(64)))

    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.content for answer in answers}) == 1
    assert len(owner.client.get("/v1/jobs").json()["data"]) == 1


def test_another_body_with_the_same_key_is_refused(owner: Owner) -> None:
    dataset = owner.add_dataset()
    post(owner, train_request(dataset), "k")

    other = post(owner, train_request(dataset, steps=7), "k")

    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reuse")


def test_a_refused_request_does_not_use_up_its_key(owner: Owner) -> None:
    refused = post(owner, train_request("ds_" + "0" * 32), "k")

    accepted = post(owner, train_request(owner.add_dataset()), "k")

    assert (refused.status_code, accepted.status_code) == (422, 202)


def test_keys_of_two_tenants_do_not_meet(owner: Owner, make_owner: MakeOwner) -> None:
    other = make_owner()

    answers = [post(each, train_request(each.add_dataset()), "k") for each in (owner, other)]

    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json()["id"] != answers[1].json()["id"]


@pytest.mark.parametrize("key", ["", "x" * 256, "two words"])
def test_a_key_that_is_no_token_is_refused(owner: Owner, key: str) -> None:
    answer = post(owner, train_request(owner.add_dataset()), key)

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["parameter"] == "header Idempotency-Key"
