"""Every family by the front door: a tiny training, what its model draws, and the same bytes again. Real parts."""

import io
from typing import Any, Final

import httpx
import numpy as np
import pytest
from PIL import Image

from noisemill.client import Client
from shared.specs import FAMILIES
from shared.wire import DatasetView, JobView
from tests.e2e.test_stack import digests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

IN_ORDER: Final = sorted(FAMILIES, key=lambda family: FAMILIES[family].model_fields["init_from"].is_required())
"""Those that begin with another's model last."""
USUAL: Final = {"style": "stylise", "translation": "translate"}
"""What families do whose models draw nothing by themselves."""


@pytest.fixture(scope="module")
def others(client: Client, tmp_path_factory: pytest.TempPathFactory) -> DatasetView:
    """Pictures of another kind: bars, dark on bright."""
    path = tmp_path_factory.mktemp("others") / "bars.npz"
    images = np.full((60, 12, 12), 230, np.uint8)
    for place, image in enumerate(images):
        image[place % 12] = place
    np.savez(path, images=images)
    return client.wait_dataset(client.upload_dataset(path, "bars", modality="image").id, 60)


def asked_of(family: str, dataset: DatasetView, others: DatasetView) -> dict[str, Any]:
    """A small training of it on this data."""
    kind = FAMILIES[family]
    spec = {"family": family, "dataset": dataset.id, "model": family, "steps": 12, "batch_size": 6, "warmup_steps": 2}
    spec |= {"betas": [0.9, 0.99]}
    spec |= dict.fromkeys(kind.further_datasets, others.id)
    return spec | ({"init_from": "diffusion@1"} if kind.model_fields["init_from"].is_required() else {})


@pytest.fixture(scope="module")
def trained(client: Client, dataset: DatasetView, others: DatasetView) -> dict[str, JobView]:
    """A training of each family, ended."""
    found: dict[str, JobView] = {}
    for family in IN_ORDER:
        found[family] = client.wait(client.submit({"type": "train", "spec": asked_of(family, dataset, others)}).id, 120)
    return found


@pytest.mark.parametrize("family", IN_ORDER)
def test_a_model_of_each_family_is_trained_and_draws_the_same_pictures_again(
    client: Client, dataset: DatasetView, trained: dict[str, JobView], family: str
) -> None:
    training = trained[family]
    assert (training.state, training.error) == ("succeeded", None)
    spec: dict[str, Any] = {"task": USUAL.get(family, "generate"), "model": f"{family}@1", "num_samples": 3}
    if family in USUAL:
        spec |= {"dataset": dataset.id} | ({"style": dataset.id} if family == "style" else {})

    drawn = client.wait(client.submit({"type": "generate", "spec": spec}).id, 120)
    again = client.wait(client.reproduce(drawn.id).id, 120)

    assert (drawn.state, drawn.error) == ("succeeded", None)
    bodies = [httpx.get(one.url).content for one in client.artifacts(drawn.id, kind="sample")]
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(body))) for body in bodies])
    assert pictures.shape == (3, 12, 12)
    assert pictures.std() > 0
    assert len(set(digests(client, drawn))) == 3
    assert digests(client, again) == digests(client, drawn)
    assert (again.result or {})["reproduction"]["identical"]
