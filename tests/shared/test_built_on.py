"""A training that names a model to build on: looked up, pinned, and refused where it cannot be used."""

from typing import Any

import pytest
from sqlalchemy import select, update
from sqlmodel import col

from shared.errors import InvalidSpec
from shared.jobs.attempts import Claim
from shared.jobs.rows import Model, ModelVersion
from tests.shared.desk import Desk
from tests.shared.test_references import WEIGHTS, add_version

NAMES = {"dataset": "ds_" + "0" * 32, "model": "m"}


def described(desk: Desk, name: str, **columns: Any) -> None:
    """Make something else of a model's versions."""
    of_model = select(col(Model.id)).where(col(Model.tenant_id) == desk.tenant_id, col(Model.name) == name)
    desk.work(
        lambda session: session.execute(
            update(ModelVersion).where(col(ModelVersion.model_id).in_(of_model)).values(**columns)
        )
    )


def train(desk: Desk, **fields: Any) -> Any:
    spec = {"family": "diffusion", "dataset": f"ds_{desk.dataset_id.hex}", "model": "drawn", "autoencoder": "base"}
    return desk.submit(spec=spec | fields)


def test_the_autoencoder_is_pinned_and_handed_to_the_worker(desk: Desk) -> None:
    add_version(desk, "base", 1)
    job = train(desk)
    add_version(desk, "base", 2)

    claimed: Claim = desk.claim()

    assert claimed.job_id == job.id
    assert claimed.spec["autoencoder"] == "base@1"
    assert claimed.inputs["models"]["autoencoder"]["weights"] == WEIGHTS


@pytest.mark.parametrize(
    ("ref", "shape", "columns"),
    [
        ("nobody", (1, 8, 8), {}),
        ("base@7", (1, 8, 8), {}),
        ("base", (3, 8, 8), {}),
        ("base", (1, 8, 8), {"family": "gan"}),
        ("base", (1, 8, 8), {"spec": {**NAMES, "family": "vae", "network": "ladder"}}),
    ],
    ids=["unknown", "unknown-version", "other-images", "other-family", "ladder"],
)
def test_an_autoencoder_that_cannot_be_used_is_pointed_at(
    desk: Desk, ref: str, shape: tuple[int, ...], columns: dict[str, Any]
) -> None:
    add_version(desk, "base", 1, shape=shape)
    if columns:
        described(desk, "base", **columns)

    with pytest.raises(InvalidSpec) as refusal:
        train(desk, autoencoder=ref)

    assert refusal.value.pointer == "/spec/autoencoder"


def test_a_fine_tuning_stays_in_the_latents_it_began_with(desk: Desk) -> None:
    add_version(desk, "base", 1)
    add_version(desk, "before", 1)
    described(desk, "before", family="diffusion", spec={**NAMES, "family": "diffusion", "autoencoder": "base@1"})
    train(desk, init_from="before")
    add_version(desk, "base", 2)

    with pytest.raises(InvalidSpec) as refusal:
        train(desk, init_from="before")

    assert refusal.value.pointer == "/spec/autoencoder"
