"""At which noise levels a solver evaluates the network: by default Karras's, at equal times those of diffusers."""

from typing import Any

import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from pydantic import ValidationError
from pydantic_core import PydanticCustomError
from torch import Tensor

from shared.specs.diffusion import DiffusionSpec
from shared.specs.noising import Process
from shared.specs.tasks import Colourise, Generate, ImageToImage, Inpaint, Interpolate, Sampling, SuperResolve
from tests.families.test_diffusion import CPU, TINY, spec_of, trained
from tests.families.test_diffusion_solvers import same
from worker.families.diffusion import FAMILY
from worker.families.family import Draw
from worker.families.nets.preconditioning import Edm, Flow, VariancePreserving
from worker.families.nets.solvers import COLUMNS, karras
from worker.families.nets.solving import FIRST, FRESH, Solve
from worker.kernels.noise import Domain, Noise

DATASET = "ds_" + "0" * 32
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "timestep_spacing": "trailing"}
LABEL = torch.tensor([1, 1])
PREDICTIONS = [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")]
OF_TIME = ["eps", "v", "x0", "flow"]


def noise_at(step: int) -> Noise:
    return Noise.of_step(Domain.SAMPLING, 4, step, range(2), CPU)


def drawn(spec: DiffusionSpec, **options: Any) -> Tensor:
    """Two samples of class 1, before they become bytes."""
    request = Generate(task="generate", model="m", seed=4, labels=[1], **options)
    sampler, net = FAMILY.tasks["generate"](spec, TINY), trained(spec)
    state = sampler.start([Draw(request=request, index=index) for index in range(2)], noise_at(0))
    for step in range(sampler.num_steps(request)):
        state = state | sampler.step(net, state, noise_at(step))
    return state["x"]


def begun(scheduler: Any) -> Tensor:
    """What is drawn first, in the scheduler's coordinates."""
    signal = scheduler.alphas_cumprod[scheduler.timesteps[0]].double()
    return noise_at(0).normal(*TINY.shape, stream=FIRST).double() * (1 - signal).sqrt()


def test_equal_times_are_those_of_diffusers_trailing() -> None:
    scheduler, objective = DDIMScheduler(**LINEAR), VariancePreserving("eps")

    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        levels = objective.levels_at_equal_times(steps)
        # Of some numbers (61, 103, …) theirs are one too many, -1: numpy's arange overshoots.
        assert objective.time_of(levels[:-1]).round().int().tolist() == scheduler.timesteps.tolist()[:steps], steps
        assert (levels[0].item(), levels[-1].item()) == (pytest.approx(objective.sigma_max), 0)


@pytest.mark.parametrize(("prediction", "name"), PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [2, 10, 50])
def test_ddim_at_equal_times_is_diffusers_ddim(prediction: str, name: str, eta: float, steps: int) -> None:
    scheduler = DDIMScheduler(**LINEAR, clip_sample=False, prediction_type=name)
    scheduler.set_timesteps(steps)
    spec = spec_of(objective=prediction)
    network, theirs = trained(spec).network, begun(scheduler)
    for step, t in enumerate(scheduler.timesteps):
        output = network(theirs.float(), t.float().expand(2), LABEL)
        fresh = noise_at(step).normal(*TINY.shape, stream=FRESH)
        theirs = scheduler.step(output, t, theirs, eta=eta, variance_noise=fresh).prev_sample

    same(drawn(spec, solver="ddim", eta=eta, steps=steps, schedule="uniform"), theirs)


OTHER_BETAS: list[tuple[str, dict[str, Any]]] = [
    ("eps", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    ("v", {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 400}),
    ("x0", {"trained_betas": [0.001 * (1 + step) for step in range(60)], "num_train_timesteps": 60}),
]


@pytest.mark.parametrize(("prediction", "process"), OTHER_BETAS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_with_other_betas_is_diffusers_ddim(prediction: str, process: dict[str, Any], eta: float) -> None:
    scheduler = DDIMScheduler(
        **process, timestep_spacing="trailing", clip_sample=False, prediction_type=dict(PREDICTIONS)[prediction]
    )
    scheduler.set_timesteps(20)
    spec = spec_of(objective=prediction, process=process)
    network, theirs = trained(spec).network, begun(scheduler)
    for step, t in enumerate(scheduler.timesteps):
        output = network(theirs.float(), t.float().expand(2), LABEL)
        fresh = noise_at(step).normal(*TINY.shape, stream=FRESH)
        theirs = scheduler.step(output, t, theirs, eta=eta, variance_noise=fresh).prev_sample

    same(drawn(spec, solver="ddim", eta=eta, steps=20, schedule="uniform"), theirs)


@pytest.mark.parametrize("times", [2, 50, 400])
def test_equal_times_of_another_number_of_them_are_those_of_diffusers_trailing(times: int) -> None:
    scheduler = DDIMScheduler(num_train_timesteps=times, timestep_spacing="trailing")
    objective = VariancePreserving("eps", Process(num_train_timesteps=times))

    for steps in range(1, times + 1):
        scheduler.set_timesteps(steps)
        levels = objective.levels_at_equal_times(steps)
        assert objective.time_of(levels[:-1]).round().int().tolist() == scheduler.timesteps.tolist()[:steps], steps


def test_a_network_is_trained_at_all_times_of_its_process() -> None:
    objective = VariancePreserving("eps", Process(num_train_timesteps=7))
    noise = Noise.of_step(Domain.TRAINING, 4, 0, range(200), CPU)

    found = objective.time_of(objective.levels(noise, 3)).round().int().unique()

    assert found.tolist() == [*range(7)]


def test_more_equal_steps_than_there_are_times_are_refused() -> None:
    spec, info = spec_of(objective="v", process={"num_train_timesteps": 20}), TINY.as_json()
    known = {"model": "m", "dataset": DATASET, "schedule": "uniform"}
    allowed: list[Any] = [
        Generate(task="generate", model="m", steps=20, schedule="uniform"),
        Generate(task="generate", model="m", steps=21),
        SuperResolve(task="super_resolve", steps=20, factor=2, **known),
    ]
    refused: list[Any] = [
        Generate(task="generate", model="m", steps=21, schedule="uniform"),
        Generate(task="generate", model="m", solver="ddim", schedule="uniform"),
        SuperResolve(task="super_resolve", factor=2, **known),
    ]

    for request in allowed:
        spec.check_task(request, info)
    for request in refused:
        with pytest.raises(PydanticCustomError) as error:
            spec.check_task(request, info)
        assert error.value.context is not None and error.value.context["field"] == "steps"


@pytest.mark.parametrize("steps", [10, 50])
def test_ddpm_at_equal_times_is_diffusers_ddpm(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = DDPMScheduler(**LINEAR, clip_sample=False, variance_type="fixed_small")
    scheduler.set_timesteps(steps)
    spec = spec_of(objective="eps")
    network, theirs = trained(spec).network, begun(scheduler)
    fresh = iter([noise_at(step).normal(*TINY.shape, stream=FRESH) for step in range(steps)])
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(fresh))
    for t in scheduler.timesteps:
        theirs = scheduler.step(network(theirs.float(), t.float().expand(2), LABEL), t, theirs).prev_sample

    same(drawn(spec, solver="ddpm", steps=steps, schedule="uniform"), theirs)


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_time_falls_evenly_in_rectified_flow(steps: int) -> None:
    levels = Flow().levels_at_equal_times(steps)

    times = levels / (1 + levels)
    assert (levels[0].item(), levels[-1].item()) == (pytest.approx(Flow.sigma_max), 0)
    assert torch.allclose(times.diff(), -times[:1] / steps)


def tables(schedule: dict[str, Any], objective: str = "eps") -> dict[str, Tensor]:
    """The noise levels of each task."""
    given = {"model": "m", "dataset": DATASET, "steps": 6, **schedule}
    requests: list[Sampling] = [
        Generate(task="generate", model="m", steps=6, solver="euler", **schedule),
        Interpolate(task="interpolate", model="m", steps=6, solver="euler", **schedule),
        Inpaint(task="inpaint", box=(0, 0, 1, 1), **given),
        SuperResolve(task="super_resolve", factor=2, **given),
        Colourise(task="colourise", **given),
        ImageToImage(task="image_to_image", solver="euler", strength=1, **given),
    ]
    found: dict[str, Tensor] = {}
    for request in requests:
        sampler: Any = FAMILY.tasks[request.task](spec_of(objective=objective), TINY)  # pyright: ignore[reportAttributeAccessIssue]
        found[type(request).__name__] = sampler.table(request)[:, COLUMNS.index("sigma")]
    return found


def test_every_task_that_solves_from_noise_has_the_levels_that_were_asked_for() -> None:
    objective = VariancePreserving("eps")

    for given, levels in (
        ({}, karras(6, objective.sigma_min, objective.sigma_max)),
        ({"schedule": "karras"}, karras(6, objective.sigma_min, objective.sigma_max)),
        ({"schedule": "uniform"}, objective.levels_at_equal_times(6)),
    ):
        found = tables(given)
        assert len(found) == 6
        for name, sigma in found.items():
            assert torch.equal(sigma, levels[:-1]), name


def test_an_image_goes_through_the_last_of_the_steps() -> None:
    request = ImageToImage(
        task="image_to_image", model="m", dataset=DATASET, steps=10, solver="ddim", strength=0.3, schedule="uniform"
    )
    sampler: Any = FAMILY.tasks["image_to_image"](spec_of(objective="v"), TINY)

    sigma = sampler.table(request)[:, COLUMNS.index("sigma")]

    assert VariancePreserving("v").time_of(sigma).round().int().tolist() == [299, 199, 99]


@pytest.mark.parametrize("objective", OF_TIME)
def test_equal_times_draw_other_samples(objective: str) -> None:
    spec = spec_of(objective=objective)

    default, karras_s, uniform = (
        drawn(spec, solver="euler", steps=5, **given) for given in ({}, {"schedule": "karras"}, {"schedule": "uniform"})
    )

    assert torch.equal(default, karras_s)
    assert uniform.isfinite().all() and not torch.allclose(uniform, default, atol=1e-3)


def test_what_was_asked_for_before_there_was_a_choice_is_told_as_it_was() -> None:
    """In the stored spec and in the recipe of a picture, whose bytes would be others."""
    plain = Generate(task="generate", model="m")

    assert "schedule" not in plain.model_dump(mode="json")
    assert Generate(task="generate", model="m", schedule="uniform").model_dump(mode="json")["schedule"] == "uniform"
    with pytest.raises(ValidationError):
        Generate.model_validate({"task": "generate", "model": "m", "schedule": "leading"})


@pytest.mark.parametrize(("objective", "refused"), [("edm", True), *((one, False) for one in OF_TIME)])
def test_an_objective_without_time_has_no_equal_times(objective: str, refused: bool) -> None:
    spec, info = spec_of(objective=objective), TINY.as_json()
    spec.check_task(Generate(task="generate", model="m", schedule="karras"), info)
    request = Inpaint(task="inpaint", model="m", dataset=DATASET, box=(0, 0, 1, 1), schedule="uniform")

    if not refused:
        spec.check_task(request, info)
        return
    with pytest.raises(PydanticCustomError) as error:
        spec.check_task(request, info)
    assert error.value.context is not None and error.value.context["field"] == "schedule"
    with pytest.raises(ValueError, match="no time"):
        Edm(0.5).levels_at_equal_times(4)


def test_a_solver_begins_where_the_noise_is_drawn() -> None:
    """The first level is the highest, or what is drawn there would be noise of another one."""
    for objective in OF_TIME:
        sampler = Solve(spec_of(objective=objective), TINY)
        assert sampler.levels(7, "uniform")[0].item() == pytest.approx(sampler.objective.sigma_max, rel=1e-12)
