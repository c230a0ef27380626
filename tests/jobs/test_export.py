"""The export job: a trained model becomes files of another library, and the same ones each time."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from shared.errors import ModelLoadFailed
from tests.jobs.conftest import DATASET_ID, DIFFUSION
from tests.jobs.folder_run import FolderRun, put
from worker.engine.checkpoint import load_weights
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo
from worker.jobs.export import export
from worker.jobs.train import train
from worker.run import Assignment, Stopped

MakeRun = Callable[..., FolderRun]
UNET = DIFFUSION | {"network": "unet", "preset": "s", "objective": "eps", "batch_size": 4, "steps": 2}
FILES = ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]


@pytest.fixture
def export_run(tmp_path: Path, dataset: dict[str, Any]) -> Callable[..., FolderRun]:
    """A run of an export job with the model of a training's result."""

    def make(result: dict[str, Any], *, fence: int, trained: dict[str, Any] = UNET) -> FolderRun:
        model = {"id": "mdl_1", "name": "bars", "version": 1, "family": "diffusion", "spec": trained}
        described = model | {"info": result["info"], "weights": result["weights"]}
        inputs = {"model": described, "dataset": dataset | {"digest": "d" * 64}}
        spec = {"model": "bars@1", "format": "diffusers"}
        assignment = Assignment(job_id="job_export", fence=fence, type="export", spec=spec, inputs=inputs)
        return FolderRun(folder=tmp_path, assignment=assignment)

    return make


def folder_of(run: FolderRun, folder: Path) -> Path:
    """What the job made, under its own names."""
    folder.mkdir()
    for artifact in run.artifacts("export"):
        (folder / artifact.name).write_bytes(run.body(artifact))
    return folder


def network_of(run: FolderRun, trained: dict[str, Any]) -> Any:
    """The network of the exported model, as the engine loads it."""
    model, family = run.assignment.inputs["model"], FAMILIES["diffusion"]
    net = build(family, family.spec.model_validate(trained), DataInfo.from_json(model["info"]))
    load_weights(run.folder / model["weights"]["key"], net)
    return net.eval().network


@pytest.mark.parametrize("choice", [{}, {"augment": 0.12}, {"objective": "flow", "dropout": 0.1}])
def test_the_folder_is_opened_by_the_library_and_means_the_same(
    train_run: MakeRun, export_run: MakeRun, choice: dict[str, Any], tmp_path: Path
) -> None:
    trained = UNET | choice
    export(run := export_run(train(train_run(base=trained)), fence=100, trained=trained))

    theirs = UNet2DModel.from_pretrained(folder_of(run, tmp_path / "diffusers")).eval()

    x, t = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 500, 900])
    with torch.no_grad():
        expected = network_of(run, trained)(x, t, torch.zeros(3, dtype=torch.long))
        assert (theirs(x, t).sample - expected).abs().max() <= 1e-5
    assert expected.std() > 0


def test_the_same_request_gives_the_same_files(train_run: MakeRun, export_run: MakeRun) -> None:
    trained = train(train_run(base=UNET))

    first, second = (export(export_run(trained, fence=fence)) for fence in (101, 102))

    assert first == second
    assert sorted(first["files"]) == FILES


def test_the_result_has_the_digest_of_every_file_and_one_over_all(train_run: MakeRun, export_run: MakeRun) -> None:
    result = export(run := export_run(train(train_run(base=UNET)), fence=103))

    found = {one.name: hashlib.sha256(run.body(one)).hexdigest() for one in run.artifacts("export")}
    assert result["files"] == found
    assert result["sha256"] == hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def test_the_card_tells_where_the_model_comes_from(train_run: MakeRun, export_run: MakeRun, tmp_path: Path) -> None:
    trained = train(train_run(base=UNET))
    result = export(run := export_run(trained, fence=104))

    card = (folder_of(run, tmp_path / "diffusers") / "README.md").read_text()
    told = json.loads(card.partition("```json\n")[2].partition("```")[0])

    assert (told["spec"], told["dataset"]["id"], told["dataset"]["digest"]) == (UNET, DATASET_ID, "d" * 64)
    digests = [trained["weights"]["sha256"], *(result["files"][name] for name in FILES[1:])]
    assert [digest for digest in digests if digest not in card] == []
    assert card.startswith("---\nlibrary_name: diffusers\n")


def test_weights_of_another_network_are_refused(train_run: MakeRun, export_run: MakeRun) -> None:
    run = export_run(train(train_run(base=DIFFUSION)), fence=105)

    with pytest.raises(ModelLoadFailed, match="does not fit the network"):
        export(run)


def test_weights_that_are_no_safetensors_are_refused(train_run: MakeRun, export_run: MakeRun, tmp_path: Path) -> None:
    trained = train(train_run(base=UNET))
    damaged = put(tmp_path, "damaged", b"nothing").as_json()

    with pytest.raises(ModelLoadFailed):
        export(export_run(trained | {"weights": damaged}, fence=106))


def test_it_can_be_stopped(train_run: MakeRun, export_run: MakeRun) -> None:
    run = export_run(train(train_run(base=UNET)), fence=107)
    run.stop_at = (1, "cancel")

    with pytest.raises(Stopped):
        export(run)
