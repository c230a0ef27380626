"""Gates of aliases: what a version has to show, and which evaluations count."""

from typing import Any

import pytest
from sqlalchemy import Engine

from tests.api.conftest import MakeOwner
from tests.api.evaluated import AT_MOST_12, FID, NO_WORSE, URL, evaluate, figure, moves, put, standing, train
from tests.api.support import Owner


def test_an_alias_moves_once_the_upper_end_of_the_interval_is_within_the_bound(owner: Owner, engine: Engine) -> None:
    train(owner, engine, versions=2)
    evaluate(owner, engine, "digits@1", **{FID: figure(10.0, 9.0, 11.0)})
    evaluate(owner, engine, "digits@2", **{FID: figure(11.5, 10.9, 12.1)})
    assert put(owner, 1, gate=AT_MOST_12).status_code == 201

    refused = put(owner, 2)
    better = evaluate(owner, engine, "digits@2", **{FID: figure(11.5, 11.1, 12.0)})

    assert refused.status_code == 409 and standing(owner) == (1, AT_MOST_12)
    assert put(owner, 2).status_code == 200
    assert owner.client.get(f"{URL}/moves").json()["data"][0]["checks"][0]["evaluation"] == better


def test_a_refusal_names_every_bound_with_its_value_and_the_evaluation_that_was_looked_at(
    owner: Owner, engine: Engine
) -> None:
    train(owner, engine)
    job = evaluate(owner, engine, "digits@1", **{FID: figure(13.0, 12.5, 13.5), "coverage": figure(0.9, 0.8, 0.95)})
    gate = [*AT_MOST_12, {"metric": "coverage", "at_least": 0.75}, {"metric": "ssim", "at_least": 0.5}]

    answer = put(owner, 1, gate=gate)
    problem = answer.json()
    told = [(c["bound"]["metric"], c["passed"], c.get("value"), c.get("evaluation")) for c in problem["checks"]]

    assert (answer.status_code, answer.headers["Content-Type"]) == (409, "application/problem+json")
    assert (problem["code"], [one["pointer"] for one in problem["errors"]]) == ("gate_failed", ["/version"] * 2)
    assert told == [(FID, False, 13.0, job), ("coverage", True, 0.9, job), ("ssim", False, None, None)]
    assert "measured are coverage, frechet_distance" in problem["errors"][1]["detail"]
    assert owner.client.get(URL).status_code == 404


@pytest.mark.parametrize(("value", "status"), [(9.0, 200), (10.0, 200), (10.1, 409)])
def test_no_worse_than_current_compares_the_values_of_two_versions(
    owner: Owner, engine: Engine, value: float, status: int
) -> None:
    dataset = train(owner, engine, versions=2)
    evaluate(owner, engine, "digits@1", dataset=dataset, **{FID: figure(10.0, 9.0, 11.0)})
    evaluate(owner, engine, "digits@2", dataset=dataset, **{FID: figure(value, value - 1, value + 1)})
    put(owner, 1, gate=NO_WORSE)

    answer = put(owner, 2)

    assert answer.status_code == status, answer.text
    check = (
        answer.json()["checks"][0] if status == 409 else owner.client.get(f"{URL}/moves").json()["data"][0]["checks"][0]
    )
    assert (check["value"], check["current_value"]) == (value, 10.0)


def test_of_some_figures_more_is_better_and_of_a_family_s_own_it_has_to_be_said(owner: Owner, engine: Engine) -> None:
    dataset = train(owner, engine, versions=2)
    for version, coverage, elbo in ((1, 0.8, -100.0), (2, 0.9, -90.0)):
        figures = {"coverage": figure(coverage, 0.0, 1.0), "elbo": figure(elbo, -110.0, -80.0)}
        evaluate(owner, engine, f"digits@{version}", dataset=dataset, **figures)
    unsaid = put(owner, 1, gate=[{"metric": "elbo", "no_worse_than_current": True}])
    gate = [{"metric": "coverage", "no_worse_than_current": True}]
    gate += [{"metric": "elbo", "no_worse_than_current": True, "better": "higher"}]

    up = [put(owner, version, gate=gate).status_code for version in (1, 2)]
    down = put(owner, 1)

    assert (unsaid.status_code, unsaid.json()["errors"][0]["pointer"]) == (422, "/gate/0/better")
    assert (up, down.status_code, len(down.json()["errors"])) == ([201, 200], 409, 2)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"features": "f2"}, "the feature network differs"),
        ({"reference": "r2"}, "the reference differs"),
        ({"num_samples": 64}, "the number of samples differs"),
    ],
)
def test_figures_of_other_digests_are_not_comparable(
    owner: Owner, engine: Engine, other: dict[str, Any], reason: str
) -> None:
    dataset = train(owner, engine, versions=2)
    now = evaluate(owner, engine, "digits@1", dataset=dataset, **{FID: figure(10.0, 9.0, 11.0)})
    evaluate(owner, engine, "digits@2", dataset=dataset, **{FID: figure(1.0, 0.5, 1.5, **other)})
    put(owner, 1, gate=NO_WORSE)

    problem = put(owner, 2).json()

    assert problem["errors"][0]["detail"] == f"not comparable with {now} of the current version: {reason}"
    assert standing(owner)[0] == 1


def test_a_figure_without_a_reference_is_compared_on_the_same_split_of_the_same_dataset(
    owner: Owner, engine: Engine
) -> None:
    dataset, gate = train(owner, engine, versions=2), [{"metric": "psnr", "no_worse_than_current": True}]
    psnr = figure(20.0, 19.0, 21.0, reference=None)
    evaluate(owner, engine, "digits@1", dataset=dataset, split="train", psnr=psnr)
    evaluate(owner, engine, "digits@2", dataset=dataset, split="held_out", psnr=psnr)
    put(owner, 1, gate=gate)

    refused = put(owner, 2)
    evaluate(owner, engine, "digits@2", dataset=dataset, split="train", psnr=psnr)

    assert "the reference differs" in refused.json()["errors"][0]["detail"]
    assert put(owner, 2).status_code == 200


def test_the_evaluation_can_be_chosen_and_a_bound_can_ask_for_a_dataset(owner: Owner, engine: Engine) -> None:
    dataset, other = train(owner, engine), owner.add_dataset()
    good = evaluate(owner, engine, "digits@1", dataset=dataset, **{FID: figure(10.0, 9.0, 11.0)})
    evaluate(owner, engine, "digits@1", dataset=other, **{FID: figure(50.0, 49.0, 51.0)})

    newest, chosen = put(owner, 1, gate=AT_MOST_12), put(owner, 1, gate=AT_MOST_12, evaluation=good)
    owner.client.delete(URL)
    elsewhere = put(owner, 1, gate=[AT_MOST_12[0] | {"dataset": other}], evaluation=good)

    assert (newest.status_code, chosen.status_code, elsewhere.status_code) == (409, 201, 409)
    assert f"on {other}" in elsewhere.json()["errors"][0]["detail"]
    assert put(owner, 1, gate=[AT_MOST_12[0] | {"dataset": dataset}]).status_code == 201


def test_only_a_succeeded_evaluation_of_this_version_by_this_tenant_counts(
    owner: Owner, make_owner: MakeOwner, engine: Engine
) -> None:
    dataset, other = train(owner, engine, versions=2), make_owner()
    train(other, engine)
    foreign = evaluate(other, engine, "digits@1", **{FID: figure(1.0, 0.5, 1.5)})
    second = evaluate(owner, engine, "digits@2", **{FID: figure(1.0, 0.5, 1.5)})
    request = {"type": "evaluate", "spec": {"model": "digits@1", "dataset": dataset}}
    queued = owner.client.post("/v1/jobs", json=request).json()["id"]
    training = owner.client.get("/v1/models/digits/versions/1").json()["job_id"]
    erased = evaluate(owner, engine, "digits@1", **{FID: figure(1.0, 0.5, 1.5)})
    owner.client.delete(f"/v1/jobs/{erased}")

    chosen = {
        one: put(owner, 1, gate=AT_MOST_12, evaluation=one) for one in (foreign, second, queued, training, erased)
    }

    assert [answer.status_code for answer in chosen.values()] == [404, 422, 422, 422, 410]
    assert chosen[queued].json()["errors"] == [
        {"pointer": "/evaluation", "detail": "the evaluation is queued: only one that succeeded counts"}
    ]
    assert put(owner, 1, gate=AT_MOST_12).status_code == 409 and owner.client.get(URL).status_code == 404


def test_a_gate_cannot_be_loosened_by_the_move_that_it_refuses(owner: Owner, engine: Engine) -> None:
    train(owner, engine, versions=2)
    evaluate(owner, engine, "digits@1", **{FID: figure(10.0, 9.0, 11.0)})
    evaluate(owner, engine, "digits@2", **{FID: figure(20.0, 19.0, 21.0)})
    put(owner, 1, gate=AT_MOST_12)
    looser = [{"metric": FID, "at_most": 30.0}]

    assert [put(owner, 2, gate=gate).status_code for gate in ([], looser)] == [409, 409]
    assert put(owner, 1, gate=looser).status_code == put(owner, 2).status_code == 200
    assert moves(owner) == [(None, 1), (1, 1), (1, 2)]
