"""Models with versions, evaluations of them that measured what a test says, and the alias ``digits@production``."""

from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from shared.jobs import attempts
from tests.api.support import Owner, claim, succeed, train_request

URL = "/v1/models/digits/aliases/production"
FID = "frechet_distance"
AT_MOST_12 = [{"metric": FID, "at_most": 12.0}]
NO_WORSE = [{"metric": FID, "no_worse_than_current": True}]


def put(owner: Owner, version: int, *, url: str = URL, headers: dict[str, str] | None = None, **body: Any) -> Any:
    return owner.client.put(url, json={"version": version, **body}, headers=headers)


def standing(owner: Owner) -> tuple[int, list[Any]]:
    view = owner.client.get(URL).json()
    return view["version"], view["gate"]


def moves(owner: Owner) -> list[tuple[int | None, int | None]]:
    """From and to, oldest first."""
    found = owner.client.get(f"{URL}/moves", params={"limit": 200}).json()["data"]
    return [(one.get("from_version"), one.get("to_version")) for one in reversed(found)]


def train(owner: Owner, engine: Engine, *, versions: int = 1) -> str:
    """So many versions of the model ``digits``; returns the dataset."""
    dataset = owner.add_dataset()
    for _ in range(versions):
        job = owner.client.post("/v1/jobs", json=train_request(dataset)).json()
        succeed(engine, claim(engine, job["id"]))
    return dataset


def figure(value: float, low: float | None, high: float | None, **fields: Any) -> dict[str, Any]:
    """As the result of an evaluate job tells it; a digest that is None is left out."""
    told = {
        "value": value,
        "confidence_95": [low, high],
        "num_samples": 1000,
        "features": "f",
        "reference": "r",
    } | fields
    return {name: one for name, one in told.items() if one is not None}


def evaluate(
    owner: Owner, engine: Engine, model: str, *, dataset: str | None = None, split: str = "held_out", **figures: Any
) -> str:
    """A succeeded evaluation that measured these figures; returns its id."""
    spec = {"model": model, "dataset": dataset or owner.add_dataset(), "split": split}
    answer = owner.client.post("/v1/jobs", json={"type": "evaluate", "spec": spec})
    assert answer.status_code == 202, answer.text
    claimed = claim(engine, answer.json()["id"])
    with Session(engine) as session, session.begin():
        assert attempts.succeed(session, claimed, result={"figures": figures}, artifacts=(), timings={}, steps=1)
    return answer.json()["id"]
