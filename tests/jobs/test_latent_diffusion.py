"""Two jobs in a row: an autoencoder, and a diffusion model that is built on it and stands alone afterwards."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.jobs.conftest import DATASET_ID, DIFFUSION, SPEC
from tests.jobs.folder_run import FolderRun, store_array
from worker.engine.checkpoint import read_tensors
from worker.jobs.generate import generate
from worker.jobs.train import train

MakeRun = Callable[..., FolderRun]
VQ = {name: SPEC[name] for name in ("dataset", "model", "batch_size", "warmup_steps")} | {"family": "vq"}
LATENT = DIFFUSION | {"autoencoder": "bars@1", "network": "unet", "steps": 3, "preview_every": 9}


@pytest.fixture
def labelled(dataset: dict[str, Any], tmp_path: Path) -> None:
    """The dataset has four classes."""
    dataset["files"].append(store_array(tmp_path, "labels.npy", np.arange(64) % 4))
    dataset["info"]["classes"] = list("abcd")


def as_input(spec: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The model version that a training published, as a later training finds it."""
    described = {"name": "bars", "version": 1, "family": spec["family"], "spec": spec}
    return described | {"info": result["info"], "weights": result["weights"]}


def weights_of(folder: Path, result: dict[str, Any]) -> dict[str, torch.Tensor]:
    tensors, _ = read_tensors(folder / result["weights"]["key"])
    return tensors


@pytest.mark.usefixtures("labelled")
@pytest.mark.parametrize("base", [SPEC | {"steps": 2}, VQ | {"steps": 2}], ids=["vae", "vq"])
def test_classes_are_drawn_in_the_latents_of_a_model_that_another_job_trained(
    train_run: MakeRun, generate_run: MakeRun, base: dict[str, Any], tmp_path: Path
) -> None:
    autoencoder = train(train_run(base=base))
    trained = train(train_run(base=LATENT, models={"autoencoder": as_input(base, autoencoder)}))
    # A finished model needs no other.
    (tmp_path / autoencoder["weights"]["key"]).unlink()
    run = generate_run(trained, base=LATENT, num_samples=4, labels=[1, 3], guidance_scale=2.0, solver="euler", steps=2)

    generate(run)

    bodies = [run.body(sample) for sample in run.artifacts("sample")]
    assert [Image.open(io.BytesIO(body)).size for body in bodies] == [(12, 12)] * 4
    assert len(set(bodies)) == 4


@pytest.mark.parametrize("base", [SPEC | {"steps": 2}, VQ | {"steps": 2}], ids=["vae", "vq"])
def test_the_autoencoder_is_to_the_bit_what_it_was(train_run: MakeRun, base: dict[str, Any], tmp_path: Path) -> None:
    autoencoder = train(train_run(base=base))
    before = weights_of(tmp_path, autoencoder)

    trained = train(train_run(base=LATENT, models={"autoencoder": as_input(base, autoencoder)}))

    after = weights_of(tmp_path, trained)
    inside = {
        name.removeprefix("autoencoder."): tensor for name, tensor in after.items() if "autoencoder." in name[:12]
    }
    assert inside.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in inside.items())
    assert after["has_begun"] and after["mean"] != 0


def test_images_are_reconstructed_through_latents(train_run: MakeRun, generate_run: MakeRun) -> None:
    autoencoder = train(train_run(steps=2))
    trained = train(train_run(base=LATENT, models={"autoencoder": as_input(SPEC, autoencoder)}))
    asked = {"dataset": DATASET_ID, "num_samples": 2, "strength": 0.5, "solver": "euler", "steps": 4}
    run = generate_run(trained, base=LATENT, task="image_to_image", **asked)

    assert generate(run)["num_samples"] == 2
