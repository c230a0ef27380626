"""The export job: a trained model becomes files of another library, and the same ones each time."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline

from shared.errors import ModelLoadFailed
from tests.families.test_diffusers_layout import filled
from tests.jobs.conftest import DATASET_ID, DIFFUSION
from tests.jobs.folder_run import FolderRun, put
from worker.engine.checkpoint import write_weights
from worker.engine.training import build
from worker.families import FAMILIES
from worker.families.family import DataInfo
from worker.jobs.export import export
from worker.kernels.noise import Domain, Noise
from worker.run import Assignment, Stopped

UNET = DIFFUSION | {"network": "unet", "preset": "s", "objective": "eps"}
FILES = ["README.md", "config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"]
KEYED = Noise.of_step(Domain.SAMPLING, 2, 0, range(3), torch.device("cpu"))
FAMILY, DATA = FAMILIES["diffusion"], DataInfo(shape=(1, 12, 12), num_classes=3)
MakeRun = Callable[..., FolderRun]


def network(spec: dict[str, Any]) -> Any:
    """A network none of whose layers is zero."""
    return filled(build(FAMILY, FAMILY.spec.model_validate(spec), DATA))


@pytest.fixture
def export_run(tmp_path: Path) -> MakeRun:
    """A run of an export job with a model of ``spec``; its weights are those of ``of``."""

    def make(*, spec: dict[str, Any] = UNET, of: dict[str, Any] | None = None, fence: int = 1) -> FolderRun:
        write_weights(path := tmp_path / "weights", network(of or spec), {})
        model = {"id": "mdl_1", "name": "bars", "version": 1, "family": "diffusion", "spec": spec}
        described = model | {"info": DATA.as_json(), "weights": put(tmp_path, "w", path.read_bytes()).as_json()}
        known = {"id": DATASET_ID, "modality": "image", "digest": "d" * 64, "info": {"shape": [1, 12, 12]}, "files": []}
        wanted = {"model": "bars@1", "format": "diffusers"}
        assignment = Assignment(
            job_id="job_1", fence=fence, type="export", spec=wanted, inputs={"model": described, "dataset": known}
        )
        return FolderRun(folder=tmp_path, assignment=assignment)

    return make


def folder_of(run: FolderRun, folder: Path) -> Path:
    """What the job made, under its own names."""
    folder.mkdir()
    for artifact in run.artifacts("export"):
        (folder / artifact.name).write_bytes(run.body(artifact))
    return folder


@pytest.mark.parametrize("choice", [{}, {"augment": 0.12}, {"class_conditional": False}, {"dropout": 0.1}])
def test_the_folder_is_opened_by_the_library_and_means_the_same(
    export_run: MakeRun, choice: dict[str, Any], tmp_path: Path
) -> None:
    export(run := export_run(spec=UNET | choice))

    theirs, ours = UNet2DModel.from_pretrained(folder_of(run, tmp_path / "out")).eval(), network(UNET | choice).network

    x, t, label = KEYED.normal(1, 12, 12), torch.tensor([3.0, 500, 900]), torch.arange(3)
    told = {"class_labels": label} if ours.class_embedding else {}
    with torch.no_grad():
        expected = ours(x, t, label)
        assert (theirs(x, t, **told).sample - expected).abs().max() <= 1e-5
    assert expected.std() > 0.05


@pytest.mark.parametrize("choice", [{}, {"process": {"beta_schedule": "scaled_linear"}}])
def test_a_model_without_classes_is_a_pipeline_of_the_library(
    export_run: MakeRun, choice: dict[str, Any], tmp_path: Path
) -> None:
    result = export(run := export_run(spec=UNET | {"class_conditional": False} | choice))

    pipeline = DDIMPipeline.from_pretrained(folder_of(run, tmp_path / "out"))

    assert sorted(result["files"]) == sorted([*FILES, "model_index.json"])
    assert pipeline.scheduler.config["beta_schedule"] == choice.get("process", {}).get("beta_schedule", "linear")
    assert "`DDIMPipeline.from_pretrained" in (tmp_path / "out" / "README.md").read_text()


def test_the_same_request_gives_the_same_files(export_run: MakeRun) -> None:
    first, second = (export(export_run(fence=fence)) for fence in (1, 2))

    assert first == second
    assert (sorted(first["files"]), first["reproducibility"]) == (FILES, "exact")


def test_the_result_has_the_digest_of_every_file_and_one_over_all(export_run: MakeRun) -> None:
    result = export(run := export_run())

    found = {one.name: hashlib.sha256(run.body(one)).hexdigest() for one in run.artifacts("export")}
    assert result["files"] == found
    assert result["sha256"] == hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def test_the_card_tells_where_the_model_comes_from(export_run: MakeRun, tmp_path: Path) -> None:
    result = export(run := export_run())

    card = (folder_of(run, tmp_path / "out") / "README.md").read_text()
    told = json.loads(card.partition("```json\n")[2].partition("```")[0])

    assert (told["spec"], told["dataset"]["id"], told["dataset"]["digest"]) == (UNET, DATASET_ID, "d" * 64)
    weights = run.assignment.inputs["model"]["weights"]["sha256"]
    assert [one for one in (weights, *(result["files"][name] for name in FILES[1:])) if one not in card] == []
    assert card.startswith("---\nlibrary_name: diffusers\n")


def test_weights_of_another_network_are_refused(export_run: MakeRun) -> None:
    with pytest.raises(ModelLoadFailed, match="does not fit the network"):
        export(export_run(of=UNET | {"network": "dit"}))


def test_it_can_be_stopped(export_run: MakeRun) -> None:
    run = export_run()
    run.stop_at = (1, "cancel")

    with pytest.raises(Stopped):
        export(run)
