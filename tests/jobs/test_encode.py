"""What tasks publish that are no new images: latents as arrays, and a row for each latent dimension."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.jobs.conftest import DATASET_ID
from tests.jobs.folder_run import FolderRun
from worker.jobs.generate import generate
from worker.jobs.train import train

MakeRun = Callable[..., FolderRun]


@pytest.fixture
def trained(train_run: MakeRun) -> dict[str, Any]:
    return train(train_run(steps=2))


def test_latents_are_published_as_arrays_without_a_sheet(generate_run: MakeRun, trained: dict[str, Any]) -> None:
    run = generate_run(trained, task="encode", dataset=DATASET_ID, num_samples=3)

    result = generate(run)

    samples = run.artifacts("sample")
    arrays = [np.load(io.BytesIO(run.body(artifact)), allow_pickle=False) for artifact in samples]
    assert [artifact.name for artifact in samples] == [f"sample-{index:04d}.npy" for index in range(3)]
    assert [(array.shape, array.dtype) for array in arrays] == [((4,), np.float32)] * 3
    assert (run.artifacts("sheet"), result["num_samples"]) == ([], 3)


def test_the_same_images_give_the_same_arrays(generate_run: MakeRun, trained: dict[str, Any]) -> None:
    few, many = (generate_run(trained, task="encode", dataset=DATASET_ID, num_samples=num) for num in (2, 8))
    generate(few)
    generate(many)

    bodies = [[run.body(artifact) for artifact in run.artifacts("sample")] for run in (few, many)]
    assert bodies[0] == bodies[1][:2]


def test_a_latent_dimension_is_one_row_of_the_sheet(generate_run: MakeRun, trained: dict[str, Any]) -> None:
    run = generate_run(trained, task="traverse", num_dimensions=4, num_points=6)

    generate(run)

    assert len(run.artifacts("sample")) == 24
    width, height = Image.open(io.BytesIO(run.body(run.artifacts("sheet")[0]))).size
    assert (width - 2) / 6 == (height - 2) / 4
