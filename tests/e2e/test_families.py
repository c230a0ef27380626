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
from tests.jobs.variants import small

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

IN_ORDER: Final = sorted(FAMILIES, key=lambda family: FAMILIES[family].model_fields["init_from"].is_required())
"""Those that begin with another's model last."""
USUAL: Final = {"style": "stylise", "translation": "translate"}
"""What families do whose models draw nothing by themselves."""


def asked_of(family: str, dataset: DatasetView) -> dict[str, Any]:
    """A small training of it on this data."""
    kind = FAMILIES[family]
    given = {name: value for name, value in small(family, kind, {}).items() if value is not None}
    spec = given | {"dataset": dataset.id, "model": family}
    spec |= dict.fromkeys(kind.further_datasets, dataset.id)
    return spec | ({"init_from": "diffusion@1"} if kind.model_fields["init_from"].is_required() else {})


@pytest.fixture(scope="module")
def trained(client: Client, dataset: DatasetView) -> dict[str, JobView]:
    """A training of each family, ended."""
    found: dict[str, JobView] = {}
    for family in IN_ORDER:
        found[family] = client.wait(client.submit({"type": "train", "spec": asked_of(family, dataset)}).id, 120)
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
