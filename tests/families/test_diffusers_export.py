"""Diffusion models exported for diffusers: which ones, and that what their card says of them is true."""

import json
import re
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from pydantic_core import PydanticCustomError

from shared.specs import FAMILIES as SPECS
from shared.specs.diffusers_folder import INDEX, WEIGHTS
from shared.specs.diffusion import DiffusionSpec
from shared.specs.export import ExportSpec
from shared.specs.imports import ImportSpec
from shared.specs.tasks import Generate
from shared.specs.unet import UNETS
from tests.families.test_admission import spec_of as any_spec_of
from tests.families.test_diffusion import spec_of, trained
from worker.families import FAMILIES
from worker.families.diffusion import build, network_of
from worker.families.family import DataInfo, Draw
from worker.families.nets.denoiser import Denoiser
from worker.families.nets.diffusers_export import to_diffusers
from worker.families.nets.diffusers_import import from_diffusers
from worker.families.nets.diffusers_layout import config_of
from worker.families.nets.unet import UNet
from worker.kernels.noise import Domain, Noise

EXPORT = ExportSpec(model="m@1", format="diffusers")
FOLDER = {"config": "config", "scheduler": "scheduler_config"}
SIDES = ((12, 8), (8, 12), (16, 8), (8, 6), (7, 8))
OBJECTIVES = ("edm", "eps", "v", "x0", "flow")


def is_accepted(spec: DiffusionSpec, shape: tuple[int, ...]) -> bool:
    try:
        spec.check_export(EXPORT, {"shape": list(shape)})
    except PydanticCustomError:
        return False
    return True


def can_be_written(spec: DiffusionSpec, shape: tuple[int, ...]) -> bool:
    with torch.device("meta"):
        network = network_of(spec, DataInfo(shape=shape))
    if not isinstance(network, UNet):
        return False
    try:
        config_of(network, shape)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("network", ["unet", "dit"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_submission_refuses_what_cannot_be_written_and_nothing_else(network: Any, objective: Any) -> None:
    specs = [spec_of(network=network, objective=objective, preset=preset) for preset in ("xs", "s", "b")]
    known = [(spec, (3, *sides)) for spec, sides in product(specs, SIDES)]

    told = [is_accepted(spec, shape) for spec, shape in known]

    assert told == [can_be_written(spec, shape) for spec, shape in known]
    assert any(told) == (network == "unet")


def test_a_model_of_latents_is_refused() -> None:
    assert not is_accepted(spec_of(objective="eps", preset="s", autoencoder="vae@1"), (3, 8, 8))


@pytest.mark.parametrize("family", SPECS)
def test_a_family_has_what_writes_each_format_that_its_spec_names(family: str) -> None:
    assert FAMILIES[family].exports.keys() == SPECS[family].exports


@pytest.mark.parametrize("family", sorted(SPECS.keys() - {"diffusion"}))
def test_models_of_other_families_are_refused(family: str) -> None:
    with pytest.raises(PydanticCustomError, match="cannot be exported as diffusers"):
        any_spec_of(family).check_export(EXPORT, {"shape": [3, 8, 8]})


def test_a_transformer_is_not_written_even_if_it_is_let_through(tmp_path: Path) -> None:
    spec, data = spec_of(network="dit", objective="eps"), DataInfo(shape=(1, 8, 8))

    with pytest.raises(ValueError, match="cannot be exported"):
        to_diffusers(tmp_path, spec, build(spec, data), data)


def test_images_that_would_have_to_be_padded_are_beyond_the_library() -> None:
    config = config_of(UNet(UNETS["s"], 1), (1, 8, 8))
    theirs = UNet2DModel(**{name: value for name, value in config.items() if name != "_class_name"})

    with pytest.raises(RuntimeError):
        theirs(torch.zeros(1, 1, 6, 8), 1)


def keyed(step: int) -> Noise:
    return Noise.of_step(Domain.SAMPLING, 4, step, range(2), torch.device("cpu"))


def exported(
    folder: Path, objective: Any, num_classes: int, process: Mapping[str, Any] | None = None
) -> tuple[Denoiser, str]:
    """A model in its folder, and what is said of its use."""
    spec = spec_of(objective=objective, preset="s", process=process or {})
    data = DataInfo(shape=(1, 8, 8), num_classes=num_classes)
    return (net := trained(spec, data)), to_diffusers(folder, spec, net, data)


def ran(usage: str) -> dict[str, Any]:
    """The names that the program of the card leaves."""
    (program,) = re.findall(r"```python\n(.*?)```", usage, re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    return names


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("objective", ["eps", "v", "x0"])
def test_the_scheduler_of_the_card_makes_the_same_image_of_the_output(
    objective: str, num_classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, usage = exported(tmp_path, objective, num_classes)
    monkeypatch.chdir(tmp_path)
    names = ran(usage)
    scheduler, time = names["scheduler"], 499
    signal = scheduler.alphas_cumprod[time].double().sqrt()
    x, label = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double(), torch.arange(4) % 3
    told = {"class_labels": label} if num_classes else {}
    sigma = ((1 - signal**2).sqrt() / signal).expand(4)

    output = names["unet"](x.float(), time, **told).sample.double()
    theirs = scheduler.step(output, time, x).pred_original_sample
    ours = net(x / signal, sigma, label)

    assert names["images"].shape == (4, 1, 8, 8)
    assert (theirs - ours).abs().max() / ours.abs().max() < 1e-5


DRAWN: list[tuple[str, dict[str, Any]]] = [
    *((objective, {}) for objective in ("eps", "v", "x0")),
    ("v", {"beta_schedule": "squaredcos_cap_v2"}),
    ("eps", {"trained_betas": [0.001 * (1 + step) for step in range(60)], "num_train_timesteps": 60}),
]


@pytest.mark.parametrize("kind", [DDIMPipeline, DDPMPipeline, DiffusionPipeline])
@pytest.mark.parametrize(("objective", "process"), DRAWN)
def test_the_librarys_pipeline_draws_what_generate_draws(
    kind: Any, objective: str, process: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, _ = exported(tmp_path, objective, 0, process)
    pipeline = kind.from_pretrained(tmp_path)
    # What a network rounds is multiplied by the deviation of the noise, 157 at first: both compute in double precision.
    net.double()
    pipeline.unet.double()
    spec, data = spec_of(objective=objective, preset="s", process=process), DataInfo(shape=(1, 8, 8))
    request = Generate(task="generate", model="m", solver="ddim", schedule="uniform", steps=10)
    sampler = FAMILIES["diffusion"].tasks["generate"](spec, data)
    state = sampler.start([Draw(request=request, index=index) for index in range(2)], keyed(0))
    # Theirs begin at noise of deviation 1, ours at what the process makes of an image in the mean.
    noise = state["x"] / (1 + net.objective.sigma_max**2) ** 0.5
    monkeypatch.setattr(sys.modules[type(pipeline).__module__], "randn_tensor", lambda *_, **__: noise)

    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(batch_size=2, num_inference_steps=10, output_type="np").images
    with torch.no_grad():
        for step in range(10):
            state = state | sampler.step(net, state, keyed(step))

    ours = (state["x"] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert (torch.from_numpy(theirs) - ours).abs().max() < 2e-5 < 1e-3 * ours.std()


def test_the_librarys_pipeline_draws_from_a_flow_what_the_card_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, usage = exported(tmp_path, "flow", 0)
    monkeypatch.chdir(tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)

    theirs = pipeline(
        batch_size=4, num_inference_steps=50, output_type="np", generator=torch.Generator().manual_seed(0)
    ).images  # pyright: ignore[reportAttributeAccessIssue]
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        images = ran(usage)["images"]

    assert (torch.from_numpy(theirs).permute(0, 3, 1, 2) - images).abs().max() < 1e-5 < 1e-3 * images.std()


def test_a_network_that_a_pipeline_would_misuse_is_none(tmp_path: Path) -> None:
    """Pipelines tell no classes and scale no input."""
    found = {
        (objective, num_classes): (exported(folder, objective, num_classes), (folder / INDEX).exists())[1]
        for objective, num_classes in product(OBJECTIVES, (0, 3))
        if (folder := tmp_path / f"{objective}{num_classes}")
    }

    assert {known for known, is_pipeline in found.items() if is_pipeline} == {
        (objective, 0) for objective in OBJECTIVES if objective != "edm"
    }


@pytest.mark.parametrize(
    ("objective", "process", "clips"),
    [
        ("eps", {}, False),
        ("eps", {"beta_schedule": "squaredcos_cap_v2"}, True),
        ("v", {"beta_schedule": "squaredcos_cap_v2"}, False),
    ],
)
def test_a_pipeline_clips_where_estimates_of_noise_say_nothing_of_the_image(
    objective: str, process: dict[str, Any], clips: bool, tmp_path: Path
) -> None:
    exported(tmp_path, objective, 0, process)

    assert DDIMPipeline.from_pretrained(tmp_path).scheduler.config["clip_sample"] is clips


def test_a_sigmoid_which_the_librarys_ddim_lacks_is_drawn_from_with_ddpm(tmp_path: Path) -> None:
    exported(tmp_path, "eps", 0, {"beta_schedule": "sigmoid"})

    pipeline = DiffusionPipeline.from_pretrained(tmp_path)

    assert (type(pipeline), type(pipeline.scheduler)) == (DDPMPipeline, DDPMScheduler)


@pytest.mark.parametrize("num_classes", [0, 3])
@pytest.mark.parametrize("place", [0, 25, 49])
def test_the_scheduler_of_the_card_makes_the_same_image_of_what_edm_returns(
    place: int, num_classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, usage = exported(tmp_path, "edm", num_classes)
    monkeypatch.chdir(tmp_path)
    names = ran(usage)
    scheduler = names["scheduler"]
    scheduler.set_timesteps(50)
    time, (now, after) = scheduler.timesteps[place], scheduler.sigmas[place : place + 2].double()
    drawn, label = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3
    x = (drawn * now).double()
    told = {"class_labels": label} if num_classes else {}

    (told_time,) = re.findall(r"unet\(.*?\), (.*?)[,)]", usage)
    output = names["unet"](scheduler.scale_model_input(x.float(), time), eval(told_time, {"t": time}), **told).sample
    theirs = scheduler.step(output.double(), time, x).prev_sample.double()
    image = net(x, now.expand(4), label)

    assert output.std() > 0.05
    assert (theirs - (x + (after - now) * (x - image) / now)).abs().max() / theirs.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("objective", "process"),
    [*((objective, {}) for objective in OBJECTIVES), *DRAWN[3:], ("x0", {"beta_schedule": "sigmoid"})],
)
@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_folder_says_all_that_an_import_has_to_know(
    objective: str, process: dict[str, Any], num_classes: int, tmp_path: Path
) -> None:
    net, _ = exported(tmp_path, objective, num_classes, process)
    wanted = ImportSpec.model_validate({"dataset": "ds_" + "0" * 32, "model": "m"})

    files = {name: json.loads((tmp_path / f"{path}.json").read_text()) for name, path in FOLDER.items()}
    found = DiffusionSpec.imported(wanted, files)
    again = build(found.spec, DataInfo.from_json(found.info))
    from_diffusers({WEIGHTS: tmp_path / WEIGHTS}, found.spec, again)

    assert (found.spec.preset, found.spec.objective) == ("s", objective)
    assert again.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in net.state_dict().items())
    sigma, label = torch.tensor([0.01, 1.0, 50.0, 3.0]).double(), torch.arange(4) % 3
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(net(x, sigma, label), again.eval()(x, sigma, label))


def test_a_flow_moves_in_the_direction_that_the_card_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, usage = exported(tmp_path, "flow", 0)
    monkeypatch.chdir(tmp_path)
    names = ran(usage)
    scheduler, place = names["scheduler"], 20
    scheduler.set_timesteps(50)
    time, (now, after) = scheduler.timesteps[place], scheduler.sigmas[place : place + 2].double()
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()

    output = names["unet"](x.float(), time).sample.double()
    theirs = scheduler.step(output, time, x).prev_sample.double()
    image = net(x / (1 - now), (now / (1 - now)).expand(4), torch.zeros(4, dtype=torch.long))

    # The straight line from here to the image, as far as the next time.
    assert (theirs - (x + (after - now) * (x - image) / now)).abs().max() < 1e-5
