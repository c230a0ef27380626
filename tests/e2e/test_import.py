"""A model arrives: a folder of the other library, uploaded, imported, drawn from, and exported back, through every real
part."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from noisemill.client import Client
from noisemill.errors import ApiError, JobFailed
from noisemill.local import Stack
from shared.specs.diffusers_unet import fields_of
from shared.specs.unet import UNETS
from shared.wire import DatasetView, JobView
from tests.e2e.conftest import LEASE_SECONDS
from tests.families.test_diffusers_layout import filled

pytestmark = pytest.mark.timeout(600)

FIELDS = {**fields_of(UNETS["s"]), "sample_size": 12, "in_channels": 1, "out_channels": 1}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    environ = dict(os.environ) | {"NOISEMILL_JOBS_LEASE": str(LEASE_SECONDS)}
    stack = Stack(tmp_path_factory.mktemp("stack"), say=lambda _: None, environ=environ)
    stack.up(flower=False)
    yield stack
    stack.down()


@pytest.fixture(scope="module")
def addresses(stack: Stack) -> dict:
    return stack.up(flower=False)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the library wrote, of a network none of whose layers is zero."""
    folder = tmp_path_factory.mktemp("theirs") / "ddpm"
    DDPMPipeline(filled(UNet2DModel(**FIELDS)), DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def imported(pipeline: Path, command: Any) -> dict[str, Any]:
    """The job of the command line's import."""
    return json.loads(command("import", str(pipeline), "--model", "theirs", "--json"))


@pytest.fixture(scope="module")
def command(addresses: dict) -> Any:
    """The command line; what it prints."""
    told = {"NOISEMILL_URL": addresses["api_url"], "NOISEMILL_API_KEY": addresses["api_key"]}

    def run(*arguments: str, exit_code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "noisemill", *arguments],
            env=os.environ | told, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == exit_code, done.stderr
        return done.stderr if exit_code else done.stdout

    return run


def test_a_folder_is_imported_by_the_command_line(client: Client, imported: dict[str, Any]) -> None:
    version = client.model_version("theirs")

    assert imported["result"]["model"] == "theirs@1"
    assert (version.family, version.spec["preset"], version.spec["objective"]) == ("diffusion", "s", "eps")
    assert version.info["imported"]["dataset"] == version.dataset_id == imported["spec"]["dataset"]


def test_it_leaves_as_it_came(imported: dict[str, Any], pipeline: Path, command: Any, tmp_path: Path) -> None:
    command("export", imported["result"]["model"], "--out", str(tmp_path / "out"))

    came = UNet2DModel.from_pretrained(pipeline / "unet").eval()
    left = UNet2DModel.from_pretrained(tmp_path / "out").eval()

    x, t = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 500, 900])
    state = left.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in came.state_dict().items())
    with torch.no_grad():
        expected = came(x, t).sample
        assert (left(x, t).sample - expected).abs().max() <= 1e-5 < 1e-3 * expected.std()
    assert DDPMScheduler.from_pretrained(tmp_path / "out").config["prediction_type"] == "epsilon"


def test_it_is_drawn_from_and_measured_as_any_model(
    client: Client, imported: dict[str, Any], dataset: DatasetView
) -> None:
    drawn = client.wait(client.generate(model="theirs", num_samples=4, steps=3, solver="ddim").id, 120)
    wanted = {"metrics": ["diversity"], "num_samples": 16, "steps": 1, "solver": "euler"}
    measured = client.wait(client.evaluate(model="theirs", dataset=dataset.id, **wanted).id, 120)

    assert len(client.artifacts(drawn.id, kind="sample")) == 4
    assert "diversity" in (measured.result or {})["figures"]


def test_a_training_goes_on_from_it(client: Client, imported: dict[str, Any], dataset: DatasetView) -> None:
    tuned = client.train(
        family="diffusion", dataset=dataset.id, model="tuned", init_from="theirs", steps=1, batch_size=4,
        preview_every=1000, class_conditional=False,
    )  # fmt: skip

    assert (client.wait(tuned.id, 200).result or {})["model"] == "tuned@1"


def test_the_import_is_made_again_byte_for_byte(client: Client, imported: dict[str, Any]) -> None:
    again = client.wait(client.reproduce(imported["id"]).id, 120)

    assert (again.result or {})["reproduction"]["identical"] is True


def test_an_export_of_ours_comes_back_as_it_is(client: Client, dataset: DatasetView, tmp_path: Path) -> None:
    """Also of the default objective, and with classes, of which its folder tells itself."""
    fields = {"preset": "s", "steps": 1, "batch_size": 4, "preview_every": 1000, "ema_decay": 0}
    client.wait(client.train(family="diffusion", dataset=dataset.id, model="ours", **fields).id, 200)
    exported = client.wait(client.export(model="ours").id, 120)
    for artifact in client.artifacts(exported.id):
        client.download(artifact, f"{tmp_path}/ours/")
    uploaded = client.upload_dataset(tmp_path / "ours", modality="model", direct=True)
    dataset_id = client.wait_dataset(uploaded.id, 60).id
    returned = client.wait(client.import_model(dataset=dataset_id, model="returned").id, 120)

    first, second = (draw(client, model, tmp_path / model) for model in ("ours", "returned"))

    assert (returned.result or {})["imported"]["sha256"] == (exported.result or {})["files"][
        "diffusion_pytorch_model.safetensors"
    ]
    assert torch.equal(first, second)


def draw(client: Client, model: str, folder: Path) -> torch.Tensor:
    """The pixels of two samples."""
    from worker.jobs.pictures import decode_png

    job = client.wait(client.generate(model=model, num_samples=2, steps=2, labels=[1], guidance_scale=2).id, 120)
    found = client.artifacts(job.id, kind="sample")
    return torch.stack([torch.from_numpy(decode_png(client.download(one, f"{folder}/"))) for one in found])


def test_what_cannot_be_imported_is_refused_by_the_field(
    client: Client, addresses: dict, pipeline: Path, dataset: DatasetView, tmp_path: Path
) -> None:
    uploaded = client.upload_dataset(pipeline / "unet", modality="model")
    folder = client.wait_dataset(uploaded.id, 60).id
    headers = {"Authorization": f"Bearer {addresses['api_key']}"}
    body = {"type": "import", "spec": {"dataset": folder, "model": "untold"}}

    answer = httpx.post(f"{addresses['api_url']}/v1/jobs", headers=headers, json=body)

    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/spec/objective")
    with pytest.raises(ApiError, match="holds image, and model is needed"):
        client.import_model(dataset=dataset.id, model="untold")


def test_weights_that_run_code_are_refused_on_either_side(client: Client, command: Any, tmp_path: Path) -> None:
    (folder := tmp_path / "pickled").mkdir()
    (folder / "config.json").write_text("{}")
    torch.save({}, folder / "diffusion_pytorch_model.bin")

    said = command("import", str(folder), "--model", "pickled", exit_code=1)
    with pytest.raises(JobFailed, match="a pickle can run code"):
        client.wait_dataset(client.upload_dataset(zipped(folder), modality="model").id, 60)

    assert "diffusion_pytorch_model.bin can run code when it is opened" in said


def zipped(folder: Path) -> Path:
    """An archive of all that is in it, which the client does not look into."""
    import shutil

    return Path(shutil.make_archive(str(folder), "zip", folder))


def test_weights_that_do_not_fit_fail_the_job_with_their_name(client: Client, tmp_path: Path) -> None:
    broken = filled(UNet2DModel(**FIELDS))
    broken.get_parameter("conv_in.bias")[0] = torch.nan
    DDPMPipeline(broken, DDPMScheduler()).save_pretrained(tmp_path / "broken")
    dataset = client.wait_dataset(client.upload_dataset(tmp_path / "broken", modality="model").id, 60)

    job: JobView = client.import_model(dataset=dataset.id, model="broken")

    with pytest.raises(JobFailed, match="conv_in.bias holds what is no finite number"):
        client.wait(job.id, 120)
    assert (error := client.job(job.id).error) and error.code == "model_load_failed"
