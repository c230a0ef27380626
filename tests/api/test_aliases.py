"""Aliases of models: what they stand for, who moved them, and that no move is lost."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from tests.api.conftest import MakeOwner
from tests.api.evaluated import AT_MOST_12, FID, URL, evaluate, figure, moves, put, standing, train
from tests.api.support import Owner, claim


def test_an_alias_stands_for_a_version_wherever_a_model_is_named(owner: Owner, engine: Engine) -> None:
    dataset = train(owner, engine, versions=2)
    assert put(owner, 1).status_code == 201
    asked = {
        "generate": {"model": "digits@production", "task": "generate"},
        "evaluate": {"model": "digits@production", "dataset": dataset},
        "train": {"family": "vae", "dataset": dataset, "model": "tuned", "init_from": "digits@production"},
    }

    jobs = [owner.client.post("/v1/jobs", json={"type": kind, "spec": spec}).json() for kind, spec in asked.items()]

    assert [job["spec"].get("init_from") or job["spec"]["model"] for job in jobs] == ["digits@1"] * 3
    assert owner.client.get("/v1/models/digits").json()["aliases"] == {"production": 1}


def test_a_job_keeps_the_version_that_the_alias_stood_for_when_it_was_submitted(owner: Owner, engine: Engine) -> None:
    train(owner, engine, versions=2)
    put(owner, 1)
    request = {"type": "generate", "spec": {"model": "digits@production", "task": "generate"}}
    job = owner.client.post("/v1/jobs", json=request).json()

    assert put(owner, 2).status_code == 200

    assert claim(engine, job["id"]).inputs["model"]["version"] == 1
    assert owner.client.post("/v1/jobs", json=request).json()["spec"]["model"] == "digits@2"


@pytest.mark.parametrize("ref", ["digits@staging", "digits@latest", "other@production"])
def test_a_reference_by_an_alias_that_there_is_not_is_refused_at_its_field(
    owner: Owner, engine: Engine, ref: str
) -> None:
    train(owner, engine)
    put(owner, 1)

    answer = owner.client.post("/v1/jobs", json={"type": "generate", "spec": {"model": ref, "task": "generate"}})

    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/spec/model")


def test_another_tenant_sees_neither_the_alias_nor_the_model_by_it(
    owner: Owner, make_owner: MakeOwner, engine: Engine
) -> None:
    train(owner, engine)
    put(owner, 1)
    other = make_owner()
    by_alias = {"type": "generate", "spec": {"model": "digits@production", "task": "generate"}}

    assert other.client.get(URL).status_code == put(other, 1).status_code == 404
    assert other.client.get(f"{URL}/moves").status_code == other.client.delete(URL).status_code == 404
    assert other.client.post("/v1/jobs", json=by_alias).status_code == 422


def test_what_is_so_already_is_no_move(owner: Owner, engine: Engine) -> None:
    train(owner, engine)
    evaluate(owner, engine, "digits@1", **{FID: figure(10.0, 9.0, 11.0)})

    answers = [put(owner, 1, gate=AT_MOST_12) for _ in range(2)] + [put(owner, 1)]

    assert [answer.status_code for answer in answers] == [201, 200, 200]
    assert len({answer.headers["ETag"] for answer in answers}) == 1 and moves(owner) == [(None, 1)]


def test_a_gate_with_a_number_that_json_writes_in_many_digits_is_the_same_gate(owner: Owner, engine: Engine) -> None:
    train(owner, engine)
    put(owner, 1)

    etags = {put(owner, 1, gate=[{"metric": FID, "at_most": 1e23}]).headers["ETag"] for _ in range(2)}

    assert len(etags) == 1


def test_a_move_says_who_made_it_and_by_what_figures(owner: Owner, engine: Engine) -> None:
    train(owner, engine)
    job = evaluate(owner, engine, "digits@1", **{FID: figure(10.0, 9.0, 11.0)})
    put(owner, 1, gate=AT_MOST_12)

    (move,) = owner.client.get(f"{URL}/moves").json()["data"]

    with Session(engine) as session:
        key = session.execute(text("SELECT id, hint FROM api_keys WHERE tenant_id = :id"), {"id": owner.id}).one()
    assert (move["key_id"], move["key_hint"]) == (f"key_{key.id.hex}", key.hint)
    assert (move["gate"], move["checks"][0]["evaluation"], move["checks"][0]["value"]) == (AT_MOST_12, job, 10.0)


def test_the_history_of_an_alias_outlives_it_and_its_evaluations(owner: Owner, engine: Engine) -> None:
    train(owner, engine)
    job = evaluate(owner, engine, "digits@1", **{FID: figure(10.0, 9.0, 11.0)})
    put(owner, 1, gate=AT_MOST_12)
    told = owner.client.get(f"{URL}/moves").json()["data"]

    owner.client.delete(f"/v1/jobs/{job}")
    removed = [owner.client.delete(URL).status_code for _ in range(2)]

    assert removed == [204, 404] and moves(owner) == [(None, 1), (1, None)]
    assert owner.client.get(f"{URL}/moves").json()["data"][1:] == told


def test_a_condition_that_does_not_hold_changes_nothing(owner: Owner, engine: Engine) -> None:
    train(owner, engine, versions=3)
    first = put(owner, 1).headers["ETag"]
    put(owner, 2)

    stale = {"move": put(owner, 3, headers={"If-Match": first}), "make": put(owner, 3, headers={"If-None-Match": "*"})}
    stale["delete"] = owner.client.delete(URL, headers={"If-Match": first})
    stale["nothing"] = put(owner, 1, url=URL + "2", headers={"If-Match": "*"})

    assert {name: answer.status_code for name, answer in stale.items()} == dict.fromkeys(stale, 412)
    assert stale["move"].json()["code"] == "precondition_failed" and moves(owner) == [(None, 1), (1, 2)]
    fresh = owner.client.get(URL).headers["ETag"]
    assert put(owner, 3, headers={"If-Match": f'"other", {fresh}'}).status_code == 200


def test_a_repeated_move_is_not_refused_for_having_been_made(owner: Owner, engine: Engine) -> None:
    """Its first answer may have been lost (RFC 9110, section 13.1.1)."""
    train(owner, engine, versions=2)
    tag = {"If-Match": put(owner, 1).headers["ETag"]}

    assert [put(owner, 2, headers=tag).status_code for _ in range(2)] == [200, 200]


def test_thirty_moves_at_once_lose_none(owner: Owner, engine: Engine) -> None:
    train(owner, engine, versions=5)
    put(owner, 1)

    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(lambda number: put(owner, 1 + number % 5), range(30)))

    chain = moves(owner)
    assert {answer.status_code for answer in answers} == {200}
    assert all(one[1] == other[0] for one, other in pairwise(chain))
    assert chain[-1][1] == standing(owner)[0] and len(chain) >= 5


def test_of_thirty_moves_from_one_state_one_is_made(owner: Owner, engine: Engine) -> None:
    train(owner, engine)
    tag = {"If-Match": put(owner, 1).headers["ETag"]}
    gates = [[{"metric": FID, "at_most": float(number)}] for number in range(30)]

    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(lambda gate: put(owner, 1, gate=gate, headers=tag), gates))

    assert sorted(answer.status_code for answer in answers) == [200] + [412] * 29
    assert len(moves(owner)) == 2


def test_thirty_that_make_the_same_alias_make_it_once(owner: Owner, engine: Engine) -> None:
    train(owner, engine)

    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(lambda _: put(owner, 1), range(30)))

    assert sorted(answer.status_code for answer in answers) == [200] * 29 + [201]
    assert moves(owner) == [(None, 1)]


def test_a_version_that_a_name_stands_for_cannot_be_deleted(owner: Owner, engine: Engine) -> None:
    train(owner, engine, versions=2)
    put(owner, 1)
    delete = text("DELETE FROM model_versions WHERE model_id IN (SELECT id FROM models WHERE tenant_id = :id)")

    with pytest.raises(IntegrityError, match="fk_model_aliases_version_id"), Session(engine) as session:
        session.execute(delete, {"id": owner.id})


def test_erasing_the_job_that_trained_it_leaves_alias_and_version(owner: Owner, engine: Engine) -> None:
    train(owner, engine)
    put(owner, 1)
    job = owner.client.get("/v1/models/digits/versions/1").json()["job_id"]

    assert owner.client.delete(f"/v1/jobs/{job}").status_code == 204

    by_alias = {"type": "generate", "spec": {"model": "digits@production", "task": "generate"}}
    assert owner.client.post("/v1/jobs", json=by_alias).status_code == 202


def test_aliases_are_listed_page_by_page(owner: Owner, engine: Engine) -> None:
    train(owner, engine, versions=2)
    for name, version in {"production": 1, "champion": 2, "a.b-c_1": 2}.items():
        put(owner, version, url=f"/v1/models/digits/aliases/{name}")

    first = owner.client.get("/v1/models/digits/aliases", params={"limit": 2}).json()
    rest = owner.client.get("/v1/models/digits/aliases", params={"cursor": first["next_cursor"]}).json()

    assert [(one["ref"], one["version"]) for one in [*first["data"], *rest["data"]]] == [
        ("digits@production", 1),
        ("digits@champion", 2),
        ("digits@a.b-c_1", 2),
    ]


def test_who_may_only_read_moves_nothing(make_owner: MakeOwner, engine: Engine) -> None:
    reader = make_owner(scopes=("jobs:read", "jobs:write", "models:read"))
    train(reader, engine)

    assert put(reader, 1).status_code == reader.client.delete(URL).status_code == 403
    assert reader.client.get("/v1/models/digits/aliases").json()["data"] == []


BOUND = {"metric": FID, "at_most": 1.0}
WRONG: list[tuple[Any, str]] = [
    ({}, "/version"),
    ({"version": 0}, "/version"),
    ({"version": "1"}, "/version"),
    ({"version": True}, "/version"),
    ({"version": 1.5}, "/version"),
    ({"version": 2**31}, "/version"),
    ({"version": 9}, "/version"),
    ({"version": 1, "force": True}, "/force"),
    ({"version": 1, "evaluation": "ds_" + "0" * 32}, "/evaluation"),
    ({"version": 1, "gate": {}}, "/gate"),
    ({"version": 1, "gate": [BOUND] * 33}, "/gate"),
    ({"version": 1, "gate": [{"metric": FID}]}, "/gate/0/metric"),
    ({"version": 1, "gate": [BOUND | {"at_least": 0.0}]}, "/gate/0/metric"),
    ({"version": 1, "gate": [BOUND | {"no_worse_than_current": True}]}, "/gate/0/metric"),
    ({"version": 1, "gate": [BOUND | {"at_most": "12"}]}, "/gate/0/at_most"),
    ({"version": 1, "gate": [BOUND | {"at_most": True}]}, "/gate/0/at_most"),
    ({"version": 1, "gate": [BOUND | {"metric": "FID!"}]}, "/gate/0/metric"),
    ({"version": 1, "gate": [BOUND | {"dataset": "digits"}]}, "/gate/0/dataset"),
    ({"version": 1, "gate": [BOUND, BOUND | {"dataset": "ds_" + "0" * 32}]}, "/gate/1/dataset"),
    ({"version": 1, "gate": [BOUND | {"better": "higher"}]}, "/gate/0/better"),
    ({"version": 1, "gate": [{"metric": FID, "no_worse_than_current": False}]}, "/gate/0/no_worse_than_current"),
    ({"version": 1, "gate": [{"metric": FID, "no_worse_than_current": True, "better": "higher"}]}, "/gate/0/better"),
]


def test_a_wrong_body_is_refused_at_its_field(owner: Owner, engine: Engine) -> None:
    train(owner, engine)

    for body, pointer in WRONG:
        answer = owner.client.put(URL, json=body)
        assert (answer.status_code, [one["pointer"] for one in answer.json()["errors"]]) == (422, [pointer]), body
    assert owner.client.get(URL).status_code == 404


def test_a_bound_that_is_no_number_is_refused(owner: Owner, engine: Engine) -> None:
    train(owner, engine)

    for number in ("NaN", "Infinity", "1e999"):
        body = f'{{"version": 1, "gate": [{{"metric": "{FID}", "at_most": {number}}}]}}'
        answer = owner.client.put(URL, content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/gate/0/at_most"), number


def test_an_alias_that_looks_like_a_version_or_is_no_name_is_refused(owner: Owner, engine: Engine) -> None:
    train(owner, engine)

    for alias in ("3", "v3", "latest", "Production", "a" * 64, "-a", "a%40b", "%00", "a%2fb"):
        answer = put(owner, 1, url=f"/v1/models/digits/aliases/{alias}")
        assert answer.status_code == (404 if alias == "a%2fb" else 422), alias
        assert answer.headers["Content-Type"] == "application/problem+json"
    assert owner.client.get("/v1/models/digits").json()["aliases"] == {}
