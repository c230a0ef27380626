"""A small dataset in a folder, and assignments that use it."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.jobs.folder_run import FolderRun, store_array
from worker.run import Assignment

DATASET_ID = "ds_" + "1" * 32
SHAPE = [1, 12, 12]
SPEC = {
    "family": "vae",
    "dataset": DATASET_ID,
    "model": "bars",
    "steps": 12,
    "batch_size": 16,
    "network": "mlp",
    "hidden_dim": 32,
    "latent_dim": 4,
    "warmup_steps": 2,
    "checkpoint_every": 5,
}
DIFFUSION = {
    "family": "diffusion",
    "dataset": DATASET_ID,
    "model": "drawn",
    "steps": 1,
    "batch_size": 16,
    "network": "dit",
    "warmup_steps": 0,
}
"""Samples of this one take many steps."""
_serial = itertools.count(1)
LeftBehind = Callable[[], list[psutil.Process]]


@pytest.fixture
def left_behind() -> LeftBehind:
    """Finds processes that were started since, those of the servers of other tests aside."""
    before = psutil.Process().children(recursive=True)

    def find() -> list[psutil.Process]:
        found = psutil.Process().children(recursive=True)
        return [one for one in found if one not in before and one.name() != "postgres"]

    return find


def bars(num_images: int) -> np.ndarray:
    """Images of one bright row or column each."""
    images = np.zeros((num_images, *SHAPE), np.uint8)
    for index in range(num_images):
        image = images[index, 0] if index % 2 else images[index, 0].T
        image[index % 12] = 200 + index % 50
    return images


@pytest.fixture
def dataset(tmp_path: Path) -> dict[str, Any]:
    """Sixty-four images in two shards, every eighth of them held out."""
    split = (np.arange(64) % 8 == 0).astype(np.uint8)
    files = [
        store_array(tmp_path, "images-00000.npy", bars(64)[:40]),
        store_array(tmp_path, "images-00001.npy", bars(64)[40:]),
        store_array(tmp_path, "split.npy", split),
    ]
    return {"id": DATASET_ID, "modality": "image", "info": {"shape": SHAPE}, "files": files}


@pytest.fixture
def train_run(tmp_path: Path, dataset: dict[str, Any]) -> Callable[..., FolderRun]:
    """A run of a train job; fields of the spec by keyword, ``resume`` the runs whose checkpoints it may go on from."""

    def make(
        *,
        base: Mapping[str, Any] = SPEC,
        resume: Sequence[FolderRun] = (),
        models: Mapping[str, Any] = {},
        **spec: Any,
    ) -> FolderRun:
        found = [checkpoint for run in resume for checkpoint in run.checkpoints()]
        inputs = {"dataset": dataset, "resume": sorted(found, key=lambda checkpoint: -checkpoint["step"])}
        serial = next(_serial)
        assignment = Assignment(
            job_id=f"job_{serial}",
            fence=serial,
            type="train",
            spec={**base, **spec},
            inputs=inputs | {"models": models},
        )
        return FolderRun(folder=tmp_path, assignment=assignment)

    return make


@pytest.fixture
def generate_run(tmp_path: Path, dataset: dict[str, Any]) -> Callable[..., FolderRun]:
    """A run of a generate job with the model of a training's result."""

    def make(
        result: dict[str, Any],
        *,
        base: Mapping[str, Any] = SPEC,
        model_spec: dict[str, Any] | None = None,
        inputs: Mapping[str, Any] = {},
        **spec: Any,
    ) -> FolderRun:
        trained = {**base, **(model_spec or {})}
        model = {"id": "mdl_1", "name": "bars", "version": 1, "family": trained["family"], "spec": trained}
        read = {"model": model | {"info": result["info"], "weights": result["weights"]}, "dataset": dataset, **inputs}
        task = {"model": "bars@1", "task": "generate"} | spec
        serial = next(_serial)
        assignment = Assignment(job_id=f"job_{serial}", fence=serial, type="generate", spec=task, inputs=read)
        return FolderRun(folder=tmp_path, assignment=assignment)

    return make


@pytest.fixture
def evaluate_run(tmp_path: Path, dataset: dict[str, Any]) -> Callable[..., FolderRun]:
    """A run of an evaluate job with the model of a training's result."""

    def make(
        result: dict[str, Any],
        *,
        data: dict[str, Any] | None = None,
        model_spec: dict[str, Any] = SPEC,
        **spec: Any,
    ) -> FolderRun:
        model = {"id": "mdl_1", "name": "bars", "version": 1, "family": model_spec["family"], "spec": model_spec}
        inputs = {"model": model | {"info": result["info"], "weights": result["weights"]}, "dataset": data or dataset}
        asked = {"model": "bars@1", "dataset": DATASET_ID, "num_samples": 48} | spec
        serial = next(_serial)
        assignment = Assignment(job_id=f"job_{serial}", fence=serial, type="evaluate", spec=asked, inputs=inputs)
        return FolderRun(folder=tmp_path, assignment=assignment)

    return make
